"""A paged KV slot allocator that needs neither Triton nor a GPU.

Upstream's allocator computes its bookkeeping in two Triton kernels. The subclass here computes the
same answers in vectorised torch, so that `--page-size` above one works on a CPU.

Source of the contract: `sglang/srt/mem_cache/allocator/paged.py` (0.5.17). Units: a *slot* is the
index of one token's KV in the pool, `page * page_size + offset`; page 0 is never handed out.
"""

from __future__ import annotations

import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator


class CpuPagedTokenToKVPoolAllocator(PagedTokenToKVPoolAllocator):
    """Hands out page-aligned slots; tensors are on the CPU and int64."""

    free_pages: torch.Tensor  # ids of the pages that are free, in the order they are taken

    def alloc_extend(
        self,
        prefix_lens: torch.Tensor,
        prefix_lens_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
        extend_num_tokens: int,
        num_new_pages: int | None = None,
    ) -> torch.Tensor | None:
        """Allocate the tokens `prefix_lens[i] .. seq_lens[i]` of each request i.

        `last_loc[i]` is the slot of the token before the first new one (-1 for an empty prefix):
        new tokens fill the rest of its page before they take pages from the free list, in order.

        Returns the `extend_num_tokens` slots, request after request, or None, with nothing
        allocated, if the free list is too short.
        """
        page = self.page_size
        if self.debug_mode:
            assert torch.all((last_loc + 1) % page == prefix_lens % page)

        pages_before = (prefix_lens + page - 1) // page
        new_pages = (seq_lens + page - 1) // page - pages_before
        free = self._free_pages_for(int(new_pages.sum()))
        if free is None:
            return None

        extend_lens = seq_lens - prefix_lens
        request = torch.repeat_interleave(torch.arange(len(prefix_lens)), extend_lens)
        first_token = torch.cumsum(extend_lens, 0) - extend_lens
        position = torch.arange(extend_num_tokens) - (first_token - prefix_lens)[request]

        first_page = torch.cumsum(new_pages, 0) - new_pages
        new_page = position // page - pages_before[request]
        continues_last_page = new_page < 0
        from_last_page = (last_loc - prefix_lens + 1)[request] + position
        if len(free) == 0:
            return from_last_page
        index = (first_page[request] + new_page).clamp_(min=0)
        from_free_page = free[index] * page + position % page
        return torch.where(continues_last_page, from_last_page, from_free_page)

    def alloc_decode(
        self,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
    ) -> torch.Tensor | None:
        """Allocate one token per request; `seq_lens` counts it already.

        Returns one slot per request, or None, with nothing allocated, if the free list is too
        short.
        """
        page = self.page_size
        if self.debug_mode:
            assert torch.all((last_loc + 2) % page == seq_lens % page)

        needs_page = (seq_lens - 1) % page == 0
        free = self._free_pages_for(int(needs_page.sum()))
        if free is None:
            return None
        slots = last_loc.to(torch.int64) + 1  # req_to_token, where it comes from, is int32
        slots[needs_page] = free * page
        return slots

    def _free_pages_for(self, num_pages: int) -> torch.Tensor | None:
        """Take the first `num_pages` of the free list, or None if it has fewer."""
        if self.need_sort and num_pages > len(self.free_pages):
            self.merge_and_sort_free()
        if num_pages > len(self.free_pages):
            return None
        taken = self.free_pages[:num_pages]
        self.free_pages = self.free_pages[num_pages:]
        return taken
