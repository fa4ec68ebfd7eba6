"""FlashInfer's cascade on a GPU: its results against attention over whole contexts in float64.

One command, where there is a GPU: pytest test/kernel/test_flashinfer_cascade_gpu.py
"""

from __future__ import annotations

import random

import pytest
import torch

from support_attention.batches import Batch, draw_batch, in_float64, relative_error
from tiered_kv.attention.flashinfer_runner import FlashInferCascadeRunner, KernelShape
from tiered_kv.attention.plan import CascadePlan
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
    shape = KernelShape(
        n_query_heads=batch.query.shape[1],
        n_kv_heads=batch.keys.shape[1],
        head_dim=batch.query.shape[2],
        query_dtype=batch.query.dtype,
        kv_dtype=batch.keys.dtype,
    )
    return FlashInferCascadeRunner(shape, torch.device("cuda"))


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
