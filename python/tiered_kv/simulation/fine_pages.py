"""Pages as small as a server's, where a trace's blocks are larger.

A trace with blocks of 512 tokens says nothing of what is equal within one, but a server keeps
pages of 64: of a prompt that is put back it loses less than a page, not less than a block.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import replace

from tiered_kv.simulation.workload.block_ids import blocks_spanned
from tiered_kv.simulation.workload.errors import WorkloadError
from tiered_kv.simulation.workload.request import Request, Workload


class FinePages:
    """`inner` with each block cut into pages, which are equal where the blocks are."""

    def __init__(self, inner: Workload, page_tokens: int) -> None:
        """Raises WorkloadError unless the blocks consist of whole pages."""
        if page_tokens < 1 or inner.block_tokens % page_tokens:
            raise WorkloadError(
                f"Blocks of {inner.block_tokens} tokens can't be cut into pages of {page_tokens}; "
                "use a divisor."
            )
        self.name = inner.name
        self.block_tokens = page_tokens
        self._inner = inner
        self._per_block = inner.block_tokens // page_tokens
        self._first: dict[int, int] = {}
        """The first page of each block: blocks have ids of any size."""

    def initial(self) -> Iterator[Request]:
        """The inner workload's, at the same times. Raises WorkloadError as `_cut`."""
        return map(self._cut, self._inner.initial())

    def follow_up(self, finished: Request, finish_s: float) -> Request | None:
        """What the inner workload says."""
        request = self._inner.follow_up(finished, finish_s)
        return None if request is None else self._cut(request)

    def _cut(self, request: Request) -> Request:
        """Raises WorkloadError where answers' blocks are known: one is partly the prompt's."""
        if request.output_blocks:
            raise WorkloadError(
                f"{self.name} says what its answers' blocks are; these can't be cut into pages."
            )
        n, first = self._per_block, self._first
        pages = array("q")
        for block in request.blocks:
            at = first.setdefault(block, n * len(first))
            pages.extend(range(at, at + n))
        n_pages = blocks_spanned(request.input_tokens, self.block_tokens)
        return replace(request, blocks=pages[:n_pages])
