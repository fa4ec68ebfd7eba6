"""FlashInfer's cascade without a GPU: the planned arrays, carried out by stand-ins for its kernels.

The stand-ins take what the wrappers take and do with it what their documentation says, in float64;
`test_signatures` compares the calls with the installed FlashInfer. Guarantee: carried out so, every
plan gives full attention; no kernel was run.
"""

from __future__ import annotations

import inspect
import random

import pytest
import torch

from support_attention.batches import Batch, draw_batch, in_float64, worst_error
from support_attention.flashinfer import PagedPrefill, attend, merge_in_place
from tiered_kv.attention.flashinfer_runner import (
    FlashInferLevels,
    can_merge,
    in_order,
    level_arrays,
    suffix_slots,
)
from tiered_kv.attention.plan import CascadePlan, Group, Level
from tiered_kv.attention.runner import PageTables


def carry_out(batch: Batch, plan: CascadePlan) -> torch.Tensor:
    """As `FlashInferCascadeRunner` and the server's backend do it, with the stand-ins."""
    levels = FlashInferLevels(batch.kernel_shape(), PagedPrefill, merge_in_place)
    tables, starts, query, order = batch.tables, plan.shared_tokens, batch.query, None
    if plan.levels:
        levels.plan(plan, tables)
        order = levels.order
    if order is not None:
        starts = tuple(starts[row] for row in plan.order)
        tables, query = in_order(tables, plan.order, order), query[order]
    indptr, slots = suffix_slots(starts, tables)
    merged, lse = torch.empty_like(query), torch.empty(query.shape[:2], dtype=query.dtype)
    for row in range(plan.n_rows):
        own = slots[indptr[row] : indptr[row + 1]].long()
        merged[row], lse[row] = (
            found[0]
            for found in attend(
                query[row : row + 1], batch.keys[own], batch.values[own], batch.scale
            )
        )
    if plan.levels:
        kv_cache = (batch.keys, batch.values)
        levels.merge_into(merged, lse, query, kv_cache, sm_scale=batch.scale)
    output = torch.empty_like(merged)
    output[slice(None) if order is None else order] = merged
    return output


@pytest.mark.parametrize("seed", range(40))
def test_every_plan_gives_full_attention(seed: int) -> None:
    batch = draw_batch(random.Random(seed), torch.float64)
    exact = in_float64(batch)
    for max_levels in (0, 1, 2, 4):
        assert worst_error(carry_out(batch, batch.plan(max_levels)), exact) < 1e-12


def test_the_drawn_plans_need_an_order_and_have_rows_in_no_group() -> None:
    """Else the test above would show less than it says."""
    plans = [draw_batch(random.Random(seed), torch.float64).plan(4) for seed in range(40)]
    assert sum(plan.order != tuple(range(plan.n_rows)) for plan in plans) > 10
    assert sum(any(level.n_rows < plan.n_rows for level in plan.levels) for plan in plans) > 10
    assert sum(len(plan.levels) > 1 for plan in plans) > 10


def test_a_wrong_slot_would_be_noticed() -> None:
    batch = draw_batch(random.Random(0), torch.float64)
    plan = batch.plan(2)
    assert plan.levels
    exact = in_float64(batch)
    table_row = batch.tables.table_rows[plan.levels[0].groups[0].leader]
    batch.tables.slots[table_row, 0] = 0
    assert worst_error(carry_out(batch, plan), exact) > 1e-6


def test_the_arrays_of_a_level() -> None:
    slots = torch.arange(60).view(6, 10)
    tables = PageTables(slots, torch.tensor([3, 1, 5, 0, 4]), (9, 9, 4, 9, 9))
    level = Level((Group((0, 1), 2, 3), Group((3, 4), 0, 2)))
    arrays = level_arrays(level, tables)
    assert arrays.qo_indptr.tolist() == [0, 2, 3, 5]
    assert arrays.kv_indptr.tolist() == [0, 3, 3, 5]
    assert arrays.kv_indices.tolist() == [32, 33, 34, 0, 1]
    assert arrays.last_page_len.tolist() == [1, 0, 1]
    assert arrays.has_kv is not None
    assert arrays.has_kv.tolist() == [True, True, False, True, True]
    whole = level_arrays(Level((Group((0, 1, 2, 3, 4), 0, 2),)), tables)
    assert whole.has_kv is None
    with pytest.raises(ValueError, match="not consecutive"):
        level_arrays(Level((Group((0, 2), 0, 3),)), tables)


def test_heads_that_the_merge_kernel_takes() -> None:
    """Its blocks have head size / elements threads per head, 1,024 in all."""
    assert can_merge(64, 128, 2)
    assert not can_merge(65, 128, 2)
    assert can_merge(128, 64, 2)
    assert not can_merge(129, 64, 2)


def test_signatures() -> None:
    """That the installed FlashInfer takes what it is given, by the names it is given under."""
    flashinfer = pytest.importorskip("flashinfer")
    from flashinfer.cascade import merge_state_in_place
    from flashinfer.page import get_seq_lens

    prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper
    decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper
    ours = inspect.signature(PagedPrefill.plan).parameters
    theirs = inspect.signature(prefill.plan).parameters
    positional = [name for name in ours if name != "options"]
    assert list(theirs)[: len(positional)] == positional
    assert {"causal", "q_data_type", "kv_data_type", "non_blocking"} <= set(theirs)
    options = {"sm_scale", "logits_soft_cap", "k_scale", "v_scale"}
    assert options | {"causal"} <= set(inspect.signature(prefill.forward_return_lse).parameters)
    assert options <= set(inspect.signature(decode.forward_return_lse).parameters)
    assert list(inspect.signature(prefill.__init__).parameters)[1:3] == [
        "float_workspace_buffer",
        "kv_layout",
    ]
    assert "backend" in inspect.signature(prefill.__init__).parameters
    assert list(inspect.signature(merge_state_in_place).parameters) == list(
        inspect.signature(merge_in_place).parameters
    )
    # Why a group without KV needs a last page of length 0.
    lengths = get_seq_lens(torch.tensor([0, 3, 3]), torch.tensor([1, 0]), 1)
    assert lengths.tolist() == [3, 0]
