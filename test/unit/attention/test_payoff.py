"""When cascade attention pays: against the figures known, and against its own arithmetic."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiered_kv.attention.grouping import Context
from tiered_kv.attention.payoff import (
    MIN_SHARED_TOKENS,
    AttentionShape,
    BreakEven,
    CascadeDevice,
    cascade_device,
    net_saving_s,
    plan_batch,
)
from tiered_kv.core.device_spec import DEVICES, find_device

LLAMA_8B = AttentionShape(n_query_heads=32, n_kv_heads=8, head_dim=128, element_bytes=2)
H200 = cascade_device(find_device("H200-141"))


def gang(n_rows: int, n_shared: int, gang_id: int = 1) -> list[Context]:
    return [Context(n_shared + 100, ((gang_id, n_shared),))] * n_rows


def break_even(n_rows: int, device: CascadeDevice, shape: AttentionShape = LLAMA_8B) -> int:
    """Fewest shared tokens from which a single gang is attended to together."""
    low, high = 0, 1 << 20
    while high - low > 1:
        middle = (low + high) // 2
        if plan_batch(gang(n_rows, middle), shape, device).levels:
            high = middle
        else:
            low = middle
    return high


def test_the_bytes_of_a_token_and_of_a_merge() -> None:
    assert LLAMA_8B.bytes_per_token == 4096
    assert LLAMA_8B.merge_bytes == 3 * 32 * 128 * 2


@pytest.mark.parametrize("name", sorted(DEVICES))
def test_below_256_shared_tokens_it_never_pays(name: str) -> None:
    device = cascade_device(DEVICES[name])
    assert not plan_batch(gang(128, 255), LLAMA_8B, device).levels
    eager = device.with_measured([BreakEven(128, 1, LLAMA_8B)], "a measurement that says always")
    assert not plan_batch(gang(128, 255), LLAMA_8B, eager).levels
    assert plan_batch(gang(128, 256), LLAMA_8B, eager).levels


def test_break_even_on_an_h200_is_near_what_was_estimated_for_it() -> None:
    """About three launches a layer: from 1.1k tokens with 8 rows, from 240 with 32."""
    assert 800 < break_even(8, H200) < 1300
    assert break_even(32, H200) == MIN_SHARED_TOKENS
    assert break_even(128, H200) == MIN_SHARED_TOKENS
    assert 5000 < break_even(2, H200) < 9000


def test_a_rank_with_one_kv_head_needs_longer_prefixes() -> None:
    rank = AttentionShape(n_query_heads=4, n_kv_heads=1, head_dim=128, element_bytes=2)
    assert break_even(8, H200, rank) > 6 * break_even(8, H200)


def test_gangs_share_one_launch() -> None:
    alone = gang(4, 1000)
    assert not plan_batch(alone, LLAMA_8B, H200).levels
    together = [context for i in range(8) for context in gang(4, 1000, i)]
    (level,) = plan_batch(together, LLAMA_8B, H200).levels
    assert len(level.groups) == 8


def test_a_second_level_must_earn_its_own_launch() -> None:
    system = (0, 4000)

    def batch(n_tools: int) -> list[Context]:
        return [Context(4000 + n_tools + 50, (system, (1 + i // 4, n_tools))) for i in range(16)]

    (level,) = plan_batch(batch(300), LLAMA_8B, H200).levels
    assert [group.length for group in level.groups] == [4000]
    assert len(plan_batch(batch(3000), LLAMA_8B, H200).levels) == 2
    assert len(plan_batch(batch(3000), LLAMA_8B, H200, max_levels=1).levels) == 1
    assert not plan_batch(batch(3000), LLAMA_8B, H200, max_levels=0).levels


def test_measured_points_are_met_and_joined() -> None:
    device = H200.with_measured(
        [BreakEven(8, 4000, LLAMA_8B), BreakEven(64, 1000, LLAMA_8B)], "measured"
    )
    assert break_even(8, device) == pytest.approx(4000, abs=2)
    assert break_even(64, device) == pytest.approx(1000, abs=2)
    # The overheads lie on a line, 28k to 61k tokens: 44k at 36 rows, which share once.
    assert break_even(36, device) == pytest.approx(44.4e3 / 34, rel=0.05)
    assert device.overhead_s(128) == pytest.approx(2 * device.overhead_s(64))
    assert device.overhead_s(2) == device.overhead_s(8)
    again = device.with_measured([BreakEven(8, 2000, LLAMA_8B)], "measured again")
    assert break_even(8, again) == pytest.approx(2000, abs=2)
    assert again.source == "measured again"


@given(st.integers(2, 300), st.integers(1, 5000), st.integers(2, 300))
def test_no_plan_is_chosen_that_loses(n_rows: int, n_shared: int, measured_rows: int) -> None:
    device = H200.with_measured([BreakEven(measured_rows, 700, LLAMA_8B)], "measured")
    for each in (H200, device):
        plan = plan_batch(gang(n_rows, n_shared), LLAMA_8B, each)
        assert net_saving_s(plan, LLAMA_8B, each) >= 0
        assert bool(plan.levels) == (net_saving_s(plan, LLAMA_8B, each) > 0)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="evenly"):
        AttentionShape(n_query_heads=6, n_kv_heads=4, head_dim=64, element_bytes=2)
    with pytest.raises(ValueError, match="must be positive"):
        AttentionShape(n_query_heads=6, n_kv_heads=0, head_dim=64, element_bytes=2)
    with pytest.raises(ValueError, match="Break-even"):
        BreakEven(1, 100, LLAMA_8B)


def test_decisions_need_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import tiered_kv.attention.grouping, tiered_kv.attention.payoff, tiered_kv.attention.plan"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_break_even_on_a_cpu_is_where_groups_were_measured_to_pay() -> None:
    """Four rows of the demo model that shared 256 tokens took two thirds of the time in a group."""
    cpu = cascade_device(find_device("CPU-2"))
    demo = AttentionShape(n_query_heads=9, n_kv_heads=3, head_dim=64, element_bytes=4)
    assert break_even(4, cpu, demo) == MIN_SHARED_TOKENS
    assert MIN_SHARED_TOKENS < break_even(2, cpu, demo) < 600
