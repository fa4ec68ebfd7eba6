"""Levels inside a CUDA graph, without a GPU: operations recorded once, repeated for other plans.

Guarantee: a graph captured with an example attends as every plan that fits says, by nothing but
what lies in its buffers; padding does no harm; what does not fit is refused. No kernel was run.
"""

from __future__ import annotations

import inspect
import random

import pytest
import torch

from support_attention.batches import Batch, draw_batch, in_float64, worst_error
from support_attention.graph import GraphDecode, GraphPrefill, RecordedGraph, merge_in_graph
from tiered_kv.attention.flashinfer_graph import (
    GraphLevels,
    GraphLevelsMaker,
    example_plan,
    fits_graph,
    groups_of_graph,
)
from tiered_kv.attention.plan import CascadePlan, Group, Level
from tiered_kv.attention.runner import PageTables

N_ROWS = 16


class Decoder:
    """A graph of one layer's attention for `N_ROWS` rows, over a batch's KV."""

    def __init__(self, batch: Batch, n_levels: int) -> None:
        self.batch = batch
        n_slots = len(batch.keys)
        maker = GraphLevelsMaker(
            batch.kernel_shape(),
            n_slots,
            n_levels,
            GraphPrefill,
            merge_in_graph,
            torch.device("cpu"),
        )
        self.levels = maker.make(N_ROWS, n_levels)
        self.decode = GraphDecode(N_ROWS, N_ROWS * batch.tables.slots.shape[1])
        self.query = torch.zeros(N_ROWS, *batch.query.shape[1:], dtype=batch.query.dtype)
        rows = torch.zeros(N_ROWS, dtype=torch.int64)
        self._plan(
            example_plan(N_ROWS, n_levels), PageTables(batch.tables.slots, rows, (9,) * N_ROWS)
        )
        self.graph = RecordedGraph()
        self.graph.capture(self._attend)

    def _plan(self, plan: CascadePlan, tables: PageTables) -> None:
        padded = self.levels.plan(plan, tables)
        starts = padded.shared_tokens
        self.decode.plan_rows(
            [
                tables.slots[tables.table_rows[row], starts[row] : tables.n_tokens[row]]
                for row in padded.order
            ]
        )

    def _attend(self) -> torch.Tensor:
        kv_cache, scale = (self.batch.keys, self.batch.values), self.batch.scale
        query = self.query[self.levels.order]
        merged, lse = self.decode.forward_return_lse(query, kv_cache, sm_scale=scale)
        self.levels.merge_into(merged, lse, query, kv_cache, sm_scale=scale)
        output = torch.empty_like(merged)
        output[self.levels.order] = merged
        return output

    def replay(self, plan: CascadePlan) -> torch.Tensor:
        tables, n = self.batch.tables, plan.n_rows
        padding = torch.zeros(N_ROWS - n, dtype=torch.int64)
        self._plan(
            plan,
            PageTables(
                tables.slots,
                torch.cat([tables.table_rows, padding]),
                (*tables.n_tokens, *(1,) * (N_ROWS - n)),
            ),
        )
        self.query[:n] = self.batch.query
        self.query[n:] = float("nan")
        return self.graph.replay()[:n].clone()


def drawn(seed: int) -> tuple[Batch, dict[int, CascadePlan]]:
    """A batch and, by their levels, its plans that fit."""
    while True:
        batch = draw_batch(random.Random(seed), torch.float64)
        plans = (batch.plan(max_levels) for max_levels in (1, 2))
        fitting = {len(p.levels): p for p in plans if p.levels and fits_graph(p, N_ROWS)}
        if fitting:
            return batch, fitting
        seed += 1000


@pytest.mark.parametrize("seed", range(30))
def test_a_replay_attends_as_the_plan_says(seed: int) -> None:
    batch, plans = drawn(seed)
    exact = in_float64(batch)
    for n_levels, plan in plans.items():
        decoder = Decoder(batch, n_levels)
        assert worst_error(decoder.replay(plan), exact) < 1e-12


def test_one_graph_replays_many_plans() -> None:
    """Groups of fewer rows and tokens, in another order, and back."""
    batch, plans = next(
        (batch, plans)
        for batch, plans in map(drawn, range(100))
        if 1 in plans and plans[1].levels[0].groups[0].length > 3 and plans[1].n_rows > 4
    )
    decoder, exact, whole = Decoder(batch, 1), in_float64(batch), plans[1]
    rows = whole.levels[0].groups[0].rows
    first = CascadePlan(whole.n_rows, (Level((Group(rows, 0, 2),)),))
    pair = CascadePlan(whole.n_rows, (Level((Group((rows[0], rows[-1]), 0, 3),)),))
    for plan in (whole, first, pair, whole, pair):
        assert worst_error(decoder.replay(plan), exact) < 1e-12


def test_a_replay_sees_nothing_but_the_buffers() -> None:
    """Else the tests above would show less than they say: unplanned, it is the last plan's."""
    batch, plans = drawn(2)
    n_levels, plan = plans.popitem()
    decoder = Decoder(batch, n_levels)
    expected = decoder.replay(plan)
    decoder.levels, decoder.decode = None, None  # type: ignore[assignment]
    assert torch.equal(decoder.graph.replay()[: plan.n_rows], expected)
    batch.keys += 1.0
    batch.values *= 2.0
    moved = decoder.graph.replay()[: plan.n_rows]
    assert worst_error(moved, in_float64(batch)) < 1e-12
    assert not torch.allclose(moved, expected)


def test_what_does_not_fit_is_refused() -> None:
    batch = drawn(0)[0]
    levels = Decoder(batch, 1).levels
    pairs = tuple(Group((2 * i, 2 * i + 1), 0, 1) for i in range(N_ROWS // 2))
    many = CascadePlan(N_ROWS, (Level(pairs),))
    assert len(pairs) > groups_of_graph(N_ROWS)
    assert not fits_graph(many, N_ROWS)
    tables = PageTables(batch.tables.slots, torch.zeros(N_ROWS, dtype=torch.int64), (9,) * N_ROWS)
    with pytest.raises(ValueError, match="does not fit a graph of 16 rows"):
        levels.plan(many, tables)
    with pytest.raises(ValueError, match="with 2 levels does not fit"):
        levels.plan(example_plan(N_ROWS, 2), tables)
    assert isinstance(levels, GraphLevels)


@pytest.mark.parametrize(
    ("n_rows", "groups"), [(2, 2), (4, 2), (8, 2), (16, 4), (64, 16), (512, 16)]
)
def test_groups_of_graph(n_rows: int, groups: int) -> None:
    """Few enough for a query tile that holds most of the rows; FlashInfer sizes it by the rest."""
    assert groups_of_graph(n_rows) == groups
    assert n_rows - groups + 1 >= n_rows / 2


def test_a_group_of_all_rows_always_fits() -> None:
    for n_rows in (2, 3, 5, 16, 300):
        assert all(fits_graph(example_plan(n_rows, n), n_rows) for n in (1, 2))
    # Padding counts as a group.
    assert fits_graph(example_plan(3, 1), 4)


def test_the_installed_wrapper_takes_these_buffers() -> None:
    flashinfer = pytest.importorskip("flashinfer")
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper
    theirs = inspect.signature(wrapper.__init__).parameters
    ours = set(inspect.signature(GraphPrefill.__init__).parameters) - {"self", "int_workspace"}
    assert ours | {"use_cuda_graph", "backend"} <= set(theirs)
    assert list(inspect.signature(wrapper.reset_workspace_buffer).parameters)[1:] == [
        "float_workspace_buffer",
        "int_workspace_buffer",
    ]
