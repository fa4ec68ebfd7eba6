"""The reference runner against attention over each whole context in float64.

Batches are drawn, with plans of up to three levels over them (`support_attention/batches.py`).
"""

from __future__ import annotations

import random

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from support_attention.batches import Batch, draw_batch, in_float64, relative_error, worst_error
from tiered_kv.attention import torch_runner
from tiered_kv.attention.grouping import Context
from tiered_kv.attention.plan import CascadePlan, Group, Level
from tiered_kv.attention.runner import CascadeRunner, PageTables
from tiered_kv.attention.torch_runner import (
    TorchCascadeRunner,
    attend_by_products,
    merge,
    unshared_groups,
)


def run(batch: Batch, plan: CascadePlan) -> torch.Tensor:
    runner: CascadeRunner = TorchCascadeRunner()
    runner.prepare(plan, batch.tables)
    output = torch.full(
        (*batch.query.shape[:2], batch.values.shape[2]), float("nan"), dtype=batch.query.dtype
    )
    returned = runner.run(batch.query, batch.keys, batch.values, output, batch.scale)
    assert returned is output
    return output


def plain(batch: Batch) -> torch.Tensor:
    """As upstream's torch_native backend: the fused kernel over each whole context."""
    rows = []
    for row, query in enumerate(batch.query):
        slots = batch.slots_of(row)
        attended = scaled_dot_product_attention(
            query[None, :, None],
            batch.keys[slots].movedim(0, 1)[None],
            batch.values[slots].movedim(0, 1)[None],
            scale=batch.scale,
            enable_gqa=True,
        )
        rows.append(attended[0, :, 0])
    return torch.stack(rows)


@pytest.mark.parametrize("seed", range(30))
def test_float32_is_exact_to_a_hundred_thousandth(seed: int) -> None:
    batch = draw_batch(random.Random(seed), torch.float32)
    exact = in_float64(batch)
    for max_levels in (0, 1, 3):
        plan = batch.plan(max_levels)
        assert not unshared_groups(plan, batch.tables)
        output = run(batch, plan)
        assert relative_error(output, exact) < 1e-5
        assert worst_error(output, exact) < 1e-5


@pytest.mark.parametrize("seed", range(6))
def test_float64_is_exact_to_its_own_digits(seed: int) -> None:
    batch = draw_batch(random.Random(seed), torch.float64)
    assert worst_error(run(batch, batch.plan(3)), in_float64(batch)) < 1e-13


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(12))
def test_half_precision_is_no_worse_than_without_cascade(seed: int, dtype: torch.dtype) -> None:
    batch = draw_batch(random.Random(1000 + seed), dtype)
    exact = in_float64(batch)
    without = relative_error(plain(batch), exact)
    for max_levels in (0, 1, 3):
        assert relative_error(run(batch, batch.plan(max_levels)), exact) <= 1.1 * without


@pytest.mark.parametrize("seed", range(5))
def test_values_of_another_size_take_the_other_path(seed: int) -> None:
    batch = draw_batch(random.Random(2000 + seed), torch.float32, value_dim=24)
    assert worst_error(run(batch, batch.plan(2)), in_float64(batch)) < 1e-5


@pytest.mark.parametrize("seed", range(6))
def test_the_kernel_and_the_products_agree(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = draw_batch(random.Random(3000 + seed), torch.float32)
    monkeypatch.setattr(torch_runner, "_kernel", attend_by_products)
    assert worst_error(run(batch, batch.plan(2)), in_float64(batch)) < 1e-5


def test_a_cache_of_another_type_is_read_in_that_of_the_query() -> None:
    batch = draw_batch(random.Random(7), torch.float32)
    batch.keys, batch.values = batch.keys.bfloat16(), batch.values.bfloat16()
    assert worst_error(run(batch, batch.plan(2)), in_float64(batch)) < 1e-5


def test_shared_kv_is_gathered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    contexts = [Context(300, ((1, 200), (2, 50)))] * 3 + [Context(260, ((1, 200),)), Context(40)]
    slots = torch.arange(5 * 300).view(5, 300)
    slots[:4, :200] = slots[0, :200]
    slots[:3, :250] = slots[0, :250]
    tables = PageTables(slots, torch.arange(5), tuple(c.n_tokens for c in contexts))
    pool = torch.randn(5 * 300, 2, 16)
    batch = Batch(contexts, tables, torch.randn(5, 4, 16), pool, pool.flip(0), 0.25)
    tokens = []
    kernel = torch_runner._kernel

    def counted(query: torch.Tensor, keys: torch.Tensor, *rest: object) -> object:
        tokens.append(keys.shape[0] * keys.shape[2])
        return kernel(query, keys, *rest)

    monkeypatch.setattr(torch_runner, "_kernel", counted)
    output = run(batch, batch.plan(2))
    # The first three's suffixes and the fourth's, of 50, 50, 50 and 60 tokens, go together.
    assert sorted(tokens) == sorted([200, 50, 4 * 60, 40])
    assert worst_error(output, in_float64(batch)) < 1e-5


def test_one_runner_serves_one_batch_after_the_other() -> None:
    runner = TorchCascadeRunner()
    for seed in (1, 2, 3):
        batch = draw_batch(random.Random(seed), torch.float32)
        runner.prepare(batch.plan(2), batch.tables)
        for _ in range(2):
            output = torch.empty_like(batch.query)
            runner.run(batch.query, batch.keys, batch.values, output, batch.scale)
            assert worst_error(output, in_float64(batch)) < 1e-5


def test_parts_far_apart_are_merged_without_overflow() -> None:
    """LSEs as large as scores of thousands make them."""
    a, b = torch.randn(1, 1, 8), torch.randn(1, 1, 8)
    for a_lse, b_lse, expected in ((5000.0, 0.0, a), (-5000.0, 4000.0, b), (4e3, 4e3, (a + b) / 2)):
        merged, lse = merge(a, torch.tensor([[a_lse]]), b, torch.tensor([[b_lse]]))
        torch.testing.assert_close(merged, expected)
        assert lse.item() == pytest.approx(max(a_lse, b_lse), abs=0.7)


def test_rows_that_do_not_hold_the_same_slots_are_found() -> None:
    slots = torch.tensor([[1, 2, 3, 9], [1, 2, 4, 8], [5, 6, 0, 0], [5, 6, 7, 0]])
    tables = PageTables(slots, torch.arange(4), (4, 4, 3, 3))
    right = CascadePlan(4, (Level((Group((0, 1), 0, 2), Group((2, 3), 0, 2))),))
    wrong = CascadePlan(4, (Level((Group((0, 1), 0, 3), Group((2, 3), 0, 2))),))
    assert unshared_groups(right, tables) == []
    assert unshared_groups(wrong, tables) == [0]


def test_plans_for_other_batches_are_refused() -> None:
    tables = PageTables(torch.zeros(2, 4, dtype=torch.int32), torch.arange(2), (4, 3))
    runner = TorchCascadeRunner()
    with pytest.raises(ValueError, match="plan for 3 rows"):
        runner.prepare(CascadePlan(3), tables)
    with pytest.raises(ValueError, match="shares 3 tokens of row 1"):
        runner.prepare(CascadePlan(2, (Level((Group((0, 1), 0, 3),)),)), tables)
    runner.prepare(CascadePlan(2), tables)
    pool = torch.zeros(4, 2, 16)
    with pytest.raises(ValueError, match="does not fit"):
        runner.run(torch.zeros(2, 3, 16), pool, pool, torch.zeros(2, 3, 16), 1.0)
    with pytest.raises(ValueError, match="does not fit"):
        runner.run(torch.zeros(3, 4, 16), pool, pool, torch.zeros(3, 4, 16), 1.0)
