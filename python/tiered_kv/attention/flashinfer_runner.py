"""Cascade attention with FlashInfer's kernels: shared KV by its prefill, suffixes by its decode.

A level is one `BatchPrefillWithPagedKVCacheWrapper` over all rows of the batch: a group is one
"request" with as many queries as rows, and one run of KV; rows in no group are in groups without
KV. The wrappers take slots as pages of one token, as upstream's backend does whatever the page
size. The results are merged by their log-sum-exps, which are FlashInfer's, to the base 2, on both
sides. Groups must be consecutive, so everything is done in the plan's order: queries are permuted
on the way in and outputs on the way out, unless the batch is in that order.

Not FlashInfer's `MultiLevelCascadeAttentionWrapper`: it lets no backend be chosen (fa3 need not
pack the heads that share a KV head), takes no scales of a quantised cache, and synchronises to
plan.

Contract: flashinfer 0.6.15 (`prefill.py`, `decode.py`, `cascade.py`); arXiv 2501.01005. Nothing
here was run on a GPU yet; the planned arrays were executed by a stand-in of the wrappers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tiered_kv.attention.plan import CascadePlan, Level
from tiered_kv.attention.runner import PageTables

#: Bytes of scratch memory that FlashInfer recommends for its wrappers' split results.
WORKSPACE_BYTES = 128 << 20

#: Threads of a block of FlashInfer's merge kernel, which has all heads of a row in one.
_MERGE_THREADS_MAX = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelShape:
    """What FlashInfer bakes into a plan."""

    n_query_heads: int
    n_kv_heads: int
    head_dim: int
    query_dtype: torch.dtype
    kv_dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class LevelArrays:
    """A level as the prefill wrapper takes it. All on the host but the slots: no synchronising."""

    qo_indptr: torch.Tensor
    """[groups + 1], int32: first row of each group."""

    kv_indptr: torch.Tensor
    """[groups + 1], int32: first of each group's slots."""

    kv_indices: torch.Tensor
    """[all shared tokens of the level], int32, on the device: the slots."""

    last_page_len: torch.Tensor
    """[groups], int32: 1, and 0 for groups without KV, whose length would come out as 1."""

    has_kv: torch.Tensor | None
    """[rows], bool, on the device: which rows there is something to merge for. None: all."""


def level_arrays(level: Level, tables: PageTables) -> LevelArrays:
    """The arrays of a level whose groups are consecutive, over `tables` in the same order.

    Raises ValueError if they are not.
    """
    n_rows = len(tables.n_tokens)
    layout = level.layout(n_rows)
    device, width = tables.slots.device, tables.slots.shape[1]
    flat, lengths = tables.slots.view(-1), torch.tensor(layout.lengths, dtype=torch.int32)
    # By arithmetic on the device: a row of the tables chosen by a device scalar would synchronise.
    first = tables.table_rows.to(torch.int64) * width
    found = [
        flat[first[leader] + torch.arange(start, start + length, device=device)]
        for leader, start, length in zip(layout.leaders, layout.starts, layout.lengths, strict=True)
        if length
    ]
    kv_indptr = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    kv_indptr[1:] = torch.cumsum(lengths, 0)
    qo_indptr = torch.tensor(layout.qo_indptr, dtype=torch.int32)
    has_kv = None
    if level.n_rows < n_rows:
        has_kv = torch.repeat_interleave(lengths > 0, qo_indptr.diff()).to(
            device, non_blocking=True
        )
    return LevelArrays(
        qo_indptr,
        kv_indptr,
        torch.cat(found).to(torch.int32),
        (lengths > 0).to(torch.int32),
        has_kv,
    )


def plan_level(wrapper: Any, arrays: LevelArrays, shape: KernelShape) -> None:
    """Have a prefill wrapper plan a level; does not synchronise with the device."""
    wrapper.plan(
        arrays.qo_indptr,
        arrays.kv_indptr,
        arrays.kv_indices,
        arrays.last_page_len,
        shape.n_query_heads,
        shape.n_kv_heads,
        shape.head_dim,
        1,
        causal=False,
        q_data_type=shape.query_dtype,
        kv_data_type=shape.kv_dtype,
        non_blocking=True,
    )


def can_merge(n_query_heads: int, head_dim: int, element_bytes: int) -> bool:
    """Whether FlashInfer's merge kernel can be launched for so many heads on a rank."""
    elements = max(16 // element_bytes, head_dim // 32)
    return n_query_heads <= _MERGE_THREADS_MAX // max(head_dim // elements, 1)


class FlashInferLevels:
    """The levels of one plan after the other: planned when the plan is new, run in each layer."""

    def __init__(
        self, shape: KernelShape, make_wrapper: Callable[[], Any], merge: Callable[..., None]
    ) -> None:
        """make_wrapper: a new prefill wrapper; merge: FlashInfer's `merge_state_in_place`.

        `flashinfer_levels` has both; stand-ins for them work without a GPU.
        """
        self._shape = shape
        self._make_wrapper = make_wrapper
        self._merge = merge
        self._wrappers: list[Any] = []
        self._levels: list[LevelArrays] = []
        self._plan: CascadePlan | None = None
        self.order: torch.Tensor | None = None
        """[rows]: the row of the batch at each place, on the device; None where they agree."""

    def holds(self, plan: CascadePlan) -> bool:
        """Whether `plan` is the very one that was taken on last: its levels need no planning."""
        return self._plan is plan

    def plan(self, plan: CascadePlan, tables: PageTables) -> None:
        """Take on a plan with at least one level, for a batch whose rows are as in `tables`."""
        self._plan = plan
        device, shape = tables.slots.device, self._shape
        order = plan.order
        self.order = None
        if order != tuple(range(plan.n_rows)):
            self.order = torch.tensor(order).to(device, non_blocking=True)
            tables = in_order(tables, order, self.order)
        self._levels = [level_arrays(level, tables) for level in plan.in_order().levels]
        while len(self._wrappers) < len(self._levels):
            self._wrappers.append(self._make_wrapper())
        for wrapper, arrays in zip(self._wrappers, self._levels, strict=False):
            plan_level(wrapper, arrays, shape)

    def merge_into(
        self,
        output: torch.Tensor,
        lse: torch.Tensor,
        query: torch.Tensor,
        kv_cache: Any,
        **options: Any,
    ) -> None:
        """Add the shared tokens to what the suffixes attended to; all in the plan's order.

        output: [rows, query heads, head size]; lse: [rows, query heads], float32, base 2; kv_cache:
        the layer's, as the decode wrapper takes it; options: those of both wrappers'
        `forward_return_lse`.
        """
        masks = [arrays.has_kv for arrays in self._levels]
        merge_levels(self._wrappers, masks, self._merge, output, lse, query, kv_cache, **options)


def merge_levels(
    wrappers: Sequence[Any],
    masks: Sequence[torch.Tensor | None],
    merge: Callable[..., None],
    output: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    kv_cache: Any,
    **options: Any,
) -> None:
    """Have planned prefill wrappers attend, one for each of `masks`; merge what these let in."""
    for wrapper, mask in zip(wrappers, masks, strict=False):
        attended, its_lse = wrapper.forward_return_lse(query, kv_cache, causal=False, **options)
        merge(output, lse, attended, its_lse, mask=mask)


def in_order(tables: PageTables, order: tuple[int, ...], on_device: torch.Tensor) -> PageTables:
    """The tables of the rows in another order, given on both sides."""
    n_tokens = tuple(tables.n_tokens[row] for row in order)
    return PageTables(tables.slots, tables.table_rows[on_device], n_tokens)


def flashinfer_levels(shape: KernelShape, workspace: torch.Tensor) -> FlashInferLevels:
    """On FlashInfer itself.

    workspace: bytes on the device; other wrappers of the same stream may use it, too.
    """
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper
    from flashinfer.cascade import merge_state_in_place

    def make_wrapper() -> Any:
        return BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="fa2")

    return FlashInferLevels(shape, make_wrapper, merge_state_in_place)


class FlashInferCascadeRunner:
    """Implements `CascadeRunner` on a GPU by itself; servers have a decode wrapper already."""

    def __init__(self, shape: KernelShape, device: torch.device) -> None:
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper

        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._shape = shape
        self._levels = flashinfer_levels(shape, workspace)
        # As upstream chooses (`should_use_tensor_core`): where a KV head has four queries or more.
        on_tensor_cores = shape.n_query_heads >= 4 * shape.n_kv_heads
        self._suffixes = BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_tensor_cores=on_tensor_cores
        )
        self._has_levels = False

    def prepare(self, plan: CascadePlan, tables: PageTables) -> None:
        shared = plan.shared_tokens
        if len(shared) != len(tables.n_tokens) or any(
            n <= start for n, start in zip(tables.n_tokens, shared, strict=True)
        ):
            raise ValueError(
                f"The plan does not fit: it shares {shared} tokens of contexts of "
                f"{tables.n_tokens} tokens, each of which must keep one."
            )
        self._has_levels = bool(plan.levels)
        if self._has_levels:
            self._levels.plan(plan, tables)
            if self._levels.order is not None:
                shared = tuple(shared[row] for row in plan.order)
                tables = in_order(tables, plan.order, self._levels.order)
        plan_suffixes(self._suffixes, shared, tables, self._shape)

    def run(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        output: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        kv_cache = (keys[:, None], values[:, None])
        if not self._has_levels:
            output.copy_(self._suffixes.forward(query, kv_cache, sm_scale=scale))
            return output
        order = self._levels.order
        if order is not None:
            query = query[order]
        merged, lse = self._suffixes.forward_return_lse(query, kv_cache, sm_scale=scale)
        self._levels.merge_into(merged, lse, query, kv_cache, sm_scale=scale)
        if order is None:
            output.copy_(merged)
        else:
            output[order] = merged
        return output


def plan_suffixes(
    wrapper: Any, starts: tuple[int, ...], tables: PageTables, shape: KernelShape
) -> None:
    """Have a decode wrapper plan each row's tokens from its start on."""
    indptr, indices = suffix_slots(starts, tables)
    wrapper.plan(
        indptr,
        indices,
        torch.ones(len(starts), dtype=torch.int32),
        shape.n_query_heads,
        shape.n_kv_heads,
        shape.head_dim,
        1,
        q_data_type=shape.query_dtype,
        kv_data_type=shape.kv_dtype,
    )


def suffix_slots(starts: tuple[int, ...], tables: PageTables) -> tuple[torch.Tensor, torch.Tensor]:
    """The slots of each row's tokens from its start on: (indptr on the host, slots), int32."""
    device = tables.slots.device
    lengths = torch.tensor(tables.n_tokens) - torch.tensor(starts)
    indptr = torch.zeros(len(starts) + 1, dtype=torch.int32)
    indptr[1:] = torch.cumsum(lengths, 0)
    place = torch.repeat_interleave(torch.arange(len(starts)), lengths)
    token = torch.arange(int(indptr[-1])) - indptr[place] + torch.tensor(starts)[place]
    place, token = place.to(device), token.to(device)
    return indptr, tables.slots[tables.table_rows[place], token].to(torch.int32)
