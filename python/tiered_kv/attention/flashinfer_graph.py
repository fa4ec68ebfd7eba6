"""The levels of a plan inside a CUDA graph: the same launches at the same addresses, each time.

A graph is captured once for a number of rows and of levels, and replayed for every plan of that
size. So what a plan says lies in tensors that stay where they are, written before a replay: the
order of the rows, and the offsets and slots of each level. FlashInfer's wrappers keep theirs in
buffers they are given, for a number of groups that is fixed; what a plan has fewer of is filled up
with groups that have neither queries nor KV.

The number of groups also chooses the kernel. FlashInfer (0.6.15, `PrefillSplitQOKVIndptr` in
`attention/scheduler.cuh`) sizes a graph's query tiles for rows - groups + 1 queries: with as many
groups as rows a tile would hold one row, and shared KV be read by each again. `groups_of_graph`
allows few, so that a group of most of the rows fits one tile.

Nothing here was run on a GPU yet; a stand-in of a graph, which replays tensor operations only, was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from tiered_kv.attention.flashinfer_runner import (
    KernelShape,
    LevelArrays,
    in_order,
    level_arrays,
    merge_levels,
    plan_level,
)
from tiered_kv.attention.plan import CascadePlan, Group, Level
from tiered_kv.attention.runner import PageTables

#: Bytes for a wrapper's planned offsets: some 10 KB for 512 rows. FlashInfer's own 8 MiB, for every
#: captured size and level, would be most of a gigabyte.
INT_WORKSPACE_BYTES = 1 << 20

_GROUPS_MAX = 16


class MakeGraphWrapper(Protocol):
    """Makes a prefill wrapper that keeps its plan in the given buffers, all int32."""

    def __call__(
        self,
        *,
        qo_indptr_buf: torch.Tensor,
        paged_kv_indptr_buf: torch.Tensor,
        paged_kv_indices_buf: torch.Tensor,
        paged_kv_last_page_len_buf: torch.Tensor,
    ) -> Any: ...


def groups_of_graph(n_rows: int) -> int:
    """Groups that a level may have in a graph of so many rows, rows in no group among them."""
    return min(max(2, n_rows // 4), _GROUPS_MAX)


def fits_graph(plan: CascadePlan, n_rows: int) -> bool:
    """Whether a plan can be replayed in a graph of `n_rows` rows, those too many being padding."""
    padded = CascadePlan(n_rows, plan.levels).in_order()
    groups = groups_of_graph(n_rows)
    return all(len(level.layout(n_rows).leaders) <= groups for level in padded.levels)


def example_plan(n_rows: int, n_levels: int) -> CascadePlan:
    """Something to capture a graph with: all rows share one token per level."""
    rows = tuple(range(n_rows))
    return CascadePlan(n_rows, tuple(Level((Group(rows, i, 1),)) for i in range(n_levels)))


class GraphLevels:
    """The levels of one captured size; `order` and `merge_into` as those of `FlashInferLevels`."""

    def __init__(
        self,
        shape: KernelShape,
        n_rows: int,
        kv_indices: Sequence[torch.Tensor],
        make_wrapper: MakeGraphWrapper,
        merge: Callable[..., None],
    ) -> None:
        """kv_indices: for each level, room for all its slots, int32 on the device.

        They may be shared with other sizes: whoever is replayed was planned before. merge:
        FlashInfer's `merge_state_in_place`.
        """
        self.n_rows, self.n_levels = n_rows, len(kv_indices)
        self._shape, self._merge = shape, merge
        self._n_groups = groups_of_graph(n_rows)
        device = kv_indices[0].device

        def buffer(size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32, device=device)

        self.order = torch.arange(n_rows, device=device)
        """[rows]: the row of the batch at each place, int64."""
        self._has_kv = [
            torch.ones(n_rows, dtype=torch.bool, device=device) for _ in range(self.n_levels)
        ]
        self._wrappers = [
            make_wrapper(
                qo_indptr_buf=buffer(self._n_groups + 1),
                paged_kv_indptr_buf=buffer(self._n_groups + 1),
                paged_kv_indices_buf=slots,
                paged_kv_last_page_len_buf=buffer(self._n_groups),
            )
            for slots in kv_indices
        ]

    def plan(self, plan: CascadePlan, tables: PageTables) -> CascadePlan:
        """Take on a plan that fits, for a batch padded to the graph's rows, as `tables` are.

        Returns the padded plan. Raises ValueError if the plan does not fit.
        """
        if len(plan.levels) != self.n_levels or not fits_graph(plan, self.n_rows):
            raise ValueError(
                f"A plan with {len(plan.levels)} levels does not fit a graph of {self.n_rows} rows "
                f"with {self.n_levels} levels of at most {self._n_groups} groups."
            )
        padded = CascadePlan(self.n_rows, plan.levels)
        self.order.copy_(torch.tensor(padded.order), non_blocking=True)
        tables = in_order(tables, padded.order, self.order)
        levels = padded.in_order().levels
        for level, wrapper, has_kv in zip(levels, self._wrappers, self._has_kv, strict=True):
            arrays = level_arrays(level, tables)
            if arrays.has_kv is None:
                has_kv.fill_(True)
            else:
                has_kv.copy_(arrays.has_kv, non_blocking=True)
            plan_level(wrapper, filled_up(arrays, self._n_groups), self._shape)
        return padded

    def merge_into(
        self,
        output: torch.Tensor,
        lse: torch.Tensor,
        query: torch.Tensor,
        kv_cache: Any,
        **options: Any,
    ) -> None:
        """As `FlashInferLevels.merge_into`; this is what a graph holds."""
        merge_levels(
            self._wrappers, self._has_kv, self._merge, output, lse, query, kv_cache, **options
        )


def filled_up(arrays: LevelArrays, n_groups: int) -> LevelArrays:
    """With groups that have neither queries nor KV at the end."""
    missing = n_groups - len(arrays.last_page_len)

    def repeat_last(offsets: torch.Tensor) -> torch.Tensor:
        return torch.cat([offsets, offsets[-1:].expand(missing)])

    return LevelArrays(
        repeat_last(arrays.qo_indptr),
        repeat_last(arrays.kv_indptr),
        arrays.kv_indices,
        torch.cat([arrays.last_page_len, arrays.last_page_len.new_zeros(missing)]),
        arrays.has_kv,
    )


class GraphLevelsMaker:
    """Makes the levels of one captured size after the other, which share what they can."""

    def __init__(
        self,
        shape: KernelShape,
        slots_max: int,
        levels_max: int,
        make_wrapper: Callable[..., Any],
        merge: Callable[..., None],
        device: torch.device,
    ) -> None:
        """slots_max: slots that a level can have at most, those of the pool.

        make_wrapper: a `MakeGraphWrapper` that also takes the level's int32 `int_workspace`.
        """
        self._shape, self._make_wrapper, self._merge = shape, make_wrapper, merge
        self.levels_max = levels_max
        self._kv_indices = [
            torch.zeros(slots_max, dtype=torch.int32, device=device) for _ in range(levels_max)
        ]
        self._workspaces = [
            torch.empty(INT_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
            for _ in range(levels_max)
        ]

    def make(self, n_rows: int, n_levels: int) -> GraphLevels:
        workspaces = iter(self._workspaces)

        def make_wrapper(**buffers: torch.Tensor) -> Any:
            return self._make_wrapper(int_workspace=next(workspaces), **buffers)

        slots = self._kv_indices[:n_levels]
        return GraphLevels(self._shape, n_rows, slots, make_wrapper, self._merge)


def flashinfer_graph_levels(
    shape: KernelShape, workspace: torch.Tensor, slots_max: int, levels_max: int
) -> GraphLevelsMaker:
    """On FlashInfer itself; arguments as for `flashinfer_levels` and `GraphLevelsMaker`."""
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper
    from flashinfer.cascade import merge_state_in_place

    def make_wrapper(*, int_workspace: torch.Tensor, **buffers: torch.Tensor) -> Any:
        wrapper = BatchPrefillWithPagedKVCacheWrapper(
            workspace, "NHD", backend="fa2", use_cuda_graph=True, **buffers
        )
        wrapper.reset_workspace_buffer(workspace, int_workspace)
        return wrapper

    return GraphLevelsMaker(
        shape, slots_max, levels_max, make_wrapper, merge_state_in_place, workspace.device
    )
