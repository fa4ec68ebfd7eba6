"""FlashInfer's cascade on a GPU: its results against attention over whole contexts in float64.

One command, where there is a GPU: pytest test/kernel/test_flashinfer_cascade_gpu.py
"""

from __future__ import annotations

import random

import pytest
import torch

from support_attention.batches import Batch, draw_batch, in_float64, relative_error
from tiered_kv.attention.flashinfer_graph import (
    example_plan,
    fits_graph,
    flashinfer_graph_levels,
)
from tiered_kv.attention.flashinfer_runner import (
    WORKSPACE_BYTES,
    FlashInferCascadeRunner,
    in_order,
    plan_suffixes,
)
from tiered_kv.attention.plan import CascadePlan, Group, Level
from tiered_kv.attention.runner import PageTables

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="FlashInfer's kernels need a GPU, and torch sees none"
)

#: Sizes that FlashInfer has kernels for; the batches of 16 and 80 are left out.
HEAD_DIMS = (64, 128)
GROUP_SIZES = (1, 2, 4, 7)


def drawn(seed: int, dtype: torch.dtype) -> Batch:
    while True:
        batch = draw_batch(random.Random(seed), dtype)
        n_sharing = batch.query.shape[1] // batch.keys.shape[1]
        if batch.query.shape[2] in HEAD_DIMS and n_sharing in GROUP_SIZES:
            return batch
        seed += 1000


def runner_for(batch: Batch) -> FlashInferCascadeRunner:
    return FlashInferCascadeRunner(batch.kernel_shape(), torch.device("cuda"))


def run(batch: Batch, plan: CascadePlan) -> torch.Tensor:
    tables = PageTables(
        batch.tables.slots.cuda(), batch.tables.table_rows.cuda(), batch.tables.n_tokens
    )
    query, keys, values = batch.query.cuda(), batch.keys.cuda(), batch.values.cuda()
    runner = runner_for(batch)
    runner.prepare(plan, tables)
    output = torch.full_like(query, float("nan"))
    assert runner.run(query, keys, values, output, batch.scale) is output
    return output.cpu()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seed", range(20))
def test_no_worse_than_plain_decoding(seed: int, dtype: torch.dtype) -> None:
    """Partial results are rounded before they are merged: half as much again is allowed for it."""
    batch = drawn(seed, dtype)
    exact = in_float64(batch)
    plain = relative_error(run(batch, batch.plan(0)), exact)
    assert plain < 0.02
    for max_levels in (1, 3):
        assert relative_error(run(batch, batch.plan(max_levels)), exact) <= 1.5 * plain + 1e-4


def test_one_runner_serves_one_batch_after_the_other() -> None:
    """The wrappers are planned anew, for other rows and other numbers of levels."""
    batch = drawn(3, torch.bfloat16)
    exact = in_float64(batch)
    tables = PageTables(
        batch.tables.slots.cuda(), batch.tables.table_rows.cuda(), batch.tables.n_tokens
    )
    query, keys, values = batch.query.cuda(), batch.keys.cuda(), batch.values.cuda()
    runner = runner_for(batch)
    for max_levels in (2, 0, 1, 3, 0):
        runner.prepare(batch.plan(max_levels), tables)
        output = runner.run(query, keys, values, torch.empty_like(query), batch.scale)
        assert relative_error(output.cpu(), exact) < 0.02


class GraphDecoder:
    """A CUDA graph of one layer's attention for `N_ROWS` rows, over a batch's KV."""

    N_ROWS = 16

    def __init__(self, batch: Batch, n_levels: int) -> None:
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper

        device, n_rows = torch.device("cuda"), self.N_ROWS
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self.batch, self.shape = batch, batch.kernel_shape()
        self.kv_cache = (batch.keys.cuda()[:, None], batch.values.cuda()[:, None])
        self.slots = batch.tables.slots.cuda()
        maker = flashinfer_graph_levels(self.shape, workspace, len(batch.keys), n_levels)
        self.levels = maker.make(n_rows, n_levels)
        self.decode = BatchDecodeWithPagedKVCacheWrapper(
            workspace,
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=self.shape.n_query_heads >= 4 * self.shape.n_kv_heads,
            paged_kv_indptr_buffer=torch.zeros(n_rows + 1, dtype=torch.int32, device=device),
            paged_kv_indices_buffer=torch.zeros(
                n_rows * self.slots.shape[1], dtype=torch.int32, device=device
            ),
            paged_kv_last_page_len_buffer=torch.ones(n_rows, dtype=torch.int32, device=device),
        )
        self.query = torch.zeros(
            n_rows, *batch.query.shape[1:], dtype=batch.query.dtype, device=device
        )
        rows = torch.zeros(n_rows, dtype=torch.int64, device=device)
        self._plan(example_plan(n_rows, n_levels), PageTables(self.slots, rows, (9,) * n_rows))
        for _ in range(2):
            self._attend()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = self._attend()

    def _plan(self, plan: CascadePlan, tables: PageTables) -> None:
        padded = self.levels.plan(plan, tables)
        starts = tuple(padded.shared_tokens[row] for row in padded.order)
        tables = in_order(tables, padded.order, self.levels.order)
        plan_suffixes(self.decode, starts, tables, self.shape)

    def _attend(self) -> torch.Tensor:
        scale = self.batch.scale
        query = self.query[self.levels.order]
        merged, lse = self.decode.forward_return_lse(query, self.kv_cache, sm_scale=scale)
        self.levels.merge_into(merged, lse, query, self.kv_cache, sm_scale=scale)
        output = torch.empty_like(merged)
        output[self.levels.order] = merged
        return output

    def replay(self, plan: CascadePlan) -> torch.Tensor:
        tables, n = self.batch.tables, plan.n_rows
        padding = self.N_ROWS - n
        rows = torch.cat([tables.table_rows, torch.zeros(padding, dtype=torch.int64)]).cuda()
        self._plan(plan, PageTables(self.slots, rows, (*tables.n_tokens, *(1,) * padding)))
        self.query[:n] = self.batch.query.cuda()
        self.graph.replay()
        return self.output[:n].cpu()


@pytest.mark.parametrize("seed", range(12))
def test_one_graph_replays_plans_that_fit(seed: int) -> None:
    """Captured with an example; then the batch's plan, half of it, and the batch's again."""
    while True:
        batch = drawn(seed, torch.bfloat16)
        plan = batch.plan(1)
        if plan.levels and fits_graph(plan, GraphDecoder.N_ROWS):
            break
        seed += 1000
    exact = in_float64(batch)
    plain = relative_error(run(batch, batch.plan(0)), exact)
    halves = tuple(Group(group.rows, 0, -(-group.length // 2)) for group in plan.levels[0].groups)
    decoder = GraphDecoder(batch, 1)
    for current in (plan, CascadePlan(plan.n_rows, (Level(halves),)), plan):
        assert relative_error(decoder.replay(current), exact) <= 1.5 * plain + 1e-4
