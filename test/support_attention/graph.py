"""A stand-in for CUDA graphs: records the tensor operations of a function, and repeats only those.

As of a graph, what a replay sees is the tensors that were there at capture, at their addresses;
Python between the operations is not run again. FlashInfer's kernels are operations of their own,
which read their plan from the buffers they were given when they are run, not when recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from support_attention.flashinfer import EMPTY_LSE, PagedPrefill, attend, merge_in_place


class RecordedGraph:
    """`capture` runs a function and remembers its operations; `replay` repeats them in place."""

    def __init__(self) -> None:
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.output: Any = None

    def capture(self, function: Callable[[], Any]) -> None:
        operations = self.operations

        class Recorder(TorchDispatchMode):
            def __torch_dispatch__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                out = func(*args, **(kwargs or {}))
                operations.append((func, args, kwargs or {}, out))
                return out

        with Recorder():
            self.output = function()

    def replay(self) -> Any:
        for func, args, kwargs, out in self.operations:
            again = func(*args, **kwargs)
            for old, new in zip(tree_flatten(out)[0], tree_flatten(again)[0], strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        return self.output


@torch.library.custom_op("tiered_kv_test::prefill", mutates_args=())
def _prefill(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    last_page_len: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    output = torch.zeros_like(query)
    lse = torch.full(query.shape[:2], EMPTY_LSE, dtype=query.dtype)
    lengths = torch.clamp(kv_indptr.diff() - 1, min=0) + last_page_len
    for i, length in enumerate(lengths.tolist()):
        rows = slice(int(qo_indptr[i]), int(qo_indptr[i + 1]))
        if length and rows.start < rows.stop:
            start = int(kv_indptr[i])
            slots = kv_indices[start : start + length].long()
            output[rows], lse[rows] = attend(query[rows], keys[slots], values[slots], scale)
    return output, lse


@torch.library.custom_op("tiered_kv_test::merge", mutates_args={"v", "s"})
def _merge(
    v: torch.Tensor,
    s: torch.Tensor,
    v_other: torch.Tensor,
    s_other: torch.Tensor,
    mask: torch.Tensor,
) -> None:
    merge_in_place(v, s, v_other, s_other, mask)


def merge_in_graph(
    v: torch.Tensor, s: torch.Tensor, v_other: torch.Tensor, s_other: torch.Tensor, mask: Any = None
) -> None:
    assert mask is not None, "which rows there are to merge may change between replays"
    _merge(v, s, v_other, s_other, mask)


class GraphPrefill(PagedPrefill):
    """As `BatchPrefillWithPagedKVCacheWrapper` with `use_cuda_graph`."""

    def __init__(
        self,
        *,
        qo_indptr_buf: torch.Tensor,
        paged_kv_indptr_buf: torch.Tensor,
        paged_kv_indices_buf: torch.Tensor,
        paged_kv_last_page_len_buf: torch.Tensor,
        int_workspace: torch.Tensor | None = None,
    ) -> None:
        assert len(qo_indptr_buf) == len(paged_kv_indptr_buf) == len(paged_kv_last_page_len_buf) + 1
        self.buffers = (qo_indptr_buf, paged_kv_indptr_buf, paged_kv_indices_buf)
        self.last = paged_kv_last_page_len_buf
        self.n_rows: int | None = None

    def plan(self, qo_indptr: torch.Tensor, *args: Any, **options: Any) -> None:
        super().plan(qo_indptr, *args, **options)
        # As FlashInfer: the first plan fixes how many rows there can be.
        self.n_rows = int(qo_indptr[-1]) if self.n_rows is None else self.n_rows
        assert int(qo_indptr[-1]) <= self.n_rows
        assert len(qo_indptr) == len(self.buffers[0])
        assert len(args[1]) <= len(self.buffers[2])
        for buffer, planned in zip(self.buffers, (qo_indptr, *args[:2]), strict=True):
            buffer[: len(planned)] = planned
        self.last.copy_(args[2])

    def forward_return_lse(
        self, query: torch.Tensor, kv_cache: Any, *, causal: bool, sm_scale: float, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert not causal
        return _prefill(query, *kv_cache, *self.buffers, self.last, sm_scale)


class GraphDecode:
    """As `BatchDecodeWithPagedKVCacheWrapper` with `use_cuda_graph`: one row, one "group"."""

    def __init__(self, n_rows: int, slots_max: int) -> None:
        self.n_rows = n_rows
        self.indptr = torch.zeros(n_rows + 1, dtype=torch.int32)
        self.indices = torch.zeros(slots_max, dtype=torch.int32)
        self.queries = torch.arange(n_rows + 1, dtype=torch.int32)
        self.last = torch.ones(n_rows, dtype=torch.int32)

    def plan_rows(self, rows: list[torch.Tensor]) -> None:
        """The slots that each row attends to."""
        assert len(rows) == self.n_rows
        lengths = torch.tensor([len(row) for row in rows])
        assert bool((lengths > 0).all())
        self.indptr[1:] = lengths.cumsum(0)
        self.indices[: int(self.indptr[-1])] = torch.cat(rows).int()

    def forward_return_lse(
        self, query: torch.Tensor, kv_cache: Any, *, sm_scale: float, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _prefill(
            query, *kv_cache, self.queries, self.indptr, self.indices, self.last, sm_scale
        )

    def forward(self, query: torch.Tensor, kv_cache: Any, **options: Any) -> torch.Tensor:
        return self.forward_return_lse(query, kv_cache, **options)[0]
