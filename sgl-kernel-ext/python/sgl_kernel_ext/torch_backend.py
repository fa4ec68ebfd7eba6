"""The ops in vectorised torch: what serves on a CPU, and on any device without Triton.

Raw pages are copied buffer by buffer. The lossy formats are converted in blocks of alike buffers
and pages, large enough to make light of the calls into torch, and small enough for a cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from sgl_kernel_ext.formats import BufferLayout, BufferSpec, PageLayout
from sgl_kernel_ext.torch_codec import WORDS, decode, encode, viewed

if TYPE_CHECKING:
    from sgl_kernel_ext.ops import PageCopy

#: Elements that are converted at a time: 1 MiB of float32.
BLOCK_ELEMENTS = 1 << 18

#: A buffer's share of a page, and its (pages, page_size, heads, head_dim) words in the pool.
Member = tuple[BufferLayout, torch.Tensor]


class TorchBackend:
    """See `ops.PagePool` for the arguments."""

    def __init__(self, buffers: Sequence[torch.Tensor], layout: PageLayout) -> None:
        self._layout = layout
        self._alike: dict[BufferSpec, list[Member]] = {}
        for share, buffer in zip(layout.buffers, buffers, strict=True):
            member = (share, pages_of(buffer, layout.page_size))
            self._alike.setdefault(share.spec.kind(layout.format), []).append(member)

    def gather(self, copy: PageCopy) -> None:
        data = copy.data
        if copy.rows is not None:
            data = data.new_zeros((len(copy.pages), copy.n_bytes))
        for members, pages in self._blocks(copy):
            share = members[0][0]
            index = copy.pages[pages]
            picked = [pool.index_select(0, index) for _, pool in members]
            if self._layout.format.is_lossy:
                x = torch.cat(picked).view(getattr(torch, share.spec.dtype))
                encoded = data.new_zeros((len(x), share.n_bytes))
                encode(x.transpose(1, 2).float(), encoded, share, self._layout.format)
                parts: Sequence[torch.Tensor] = encoded.split(len(index))
            else:
                parts = [words.contiguous().flatten(1).view(torch.uint8) for words in picked]
            for (share, _), part in zip(members, parts, strict=True):
                data[pages, columns(share, copy)] = part
        if copy.rows is not None:
            copy.data[:, : copy.n_bytes].index_copy_(0, copy.rows, data)

    def scatter(self, copy: PageCopy) -> None:
        data = copy.data
        if copy.rows is not None:
            data = data[:, : copy.n_bytes].index_select(0, copy.rows)
        for members, pages in self._blocks(copy):
            share, pool = members[0]
            index = copy.pages[pages]
            parts: Sequence[torch.Tensor] = [data[pages, columns(s, copy)] for s, _ in members]
            if self._layout.format.is_lossy:
                x = decode(torch.cat(parts), share, self._layout.format)
                words = x.to(getattr(torch, share.spec.dtype)).view(pool.dtype)
                parts = words.transpose(1, 2).split(len(index))
            else:
                parts = [viewed(p, pool.dtype).unflatten(1, pool.shape[1:]) for p in parts]
            for (_, pool), part in zip(members, parts, strict=True):
                pool.index_copy_(0, index, part)

    def _blocks(self, copy: PageCopy) -> Iterator[tuple[list[Member], slice]]:
        """Buffers and pages of the call to convert at a time."""
        n_pages = len(copy.pages)
        if n_pages == 0:
            return
        for alike in self._alike.values():
            members = [m for m in alike if m[0].spec.layer in copy.layers]
            step, width = n_pages, 1
            if self._layout.format.is_lossy:
                pages_in_block = max(1, BLOCK_ELEMENTS // alike[0][1][0].numel())
                step = min(n_pages, pages_in_block)
                width = max(1, pages_in_block // step)
            for first in range(0, len(members), width):
                for start in range(0, n_pages, step):
                    pages = slice(start, min(start + step, n_pages))
                    yield members[first : first + width], pages


def columns(share: BufferLayout, copy: PageCopy) -> slice:
    """Where a buffer's share lies in the rows of a call."""
    start = share.offset - copy.first_byte
    return slice(start, start + share.n_bytes)


def pages_of(buffer: torch.Tensor, page_size: int) -> torch.Tensor:
    """(slots, heads, head_dim) seen as (pages, page_size, heads, head_dim) integers; no copy."""
    n_pages = buffer.shape[0] // page_size
    words = buffer[: n_pages * page_size].view(WORDS[buffer.element_size()])
    return words.unflatten(0, (n_pages, page_size))
