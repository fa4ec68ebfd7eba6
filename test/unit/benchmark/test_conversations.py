"""The load of `benchmark/serving/multiturn.py`, and its ratios, without a server."""

from __future__ import annotations

import pytest

from benchmark.serving.conversations import Load, Sample, Shape
from benchmark.serving.multiturn_report import Run, ratios, row, table

SHAPE = Shape(conversations=5, turns=3, first_tokens=64, turn_tokens=28, answer_tokens=4)


@pytest.mark.parametrize("size", [1, 2, 16])
def test_blocks_hold_every_turn_once_and_never_two_of_a_conversation(size: int) -> None:
    blocks = Load(SHAPE, 1, 0.1, seed=7).blocks(size)
    asked = [number for block in blocks for number, _ in block]
    for at in range(SHAPE.turns):
        turn = asked[at * SHAPE.conversations : (at + 1) * SHAPE.conversations]
        assert sorted(turn) == list(range(SHAPE.conversations))
    assert all(1 <= len(block) <= size for block in blocks)
    assert all(len({number for number, _ in block}) == len(block) for block in blocks)


def test_every_system_gets_the_same_load_and_every_seed_another() -> None:
    load = Load(SHAPE, 1, 0.1, seed=7)
    assert load.blocks(2) == Load(SHAPE, 1, 0.1, seed=7).blocks(2)
    assert load.blocks(2) != Load(SHAPE, 1, 0.1, seed=8).blocks(2)
    assert {pause_s for block in Load(SHAPE, 1, 0.0, 7).blocks(2) for _, pause_s in block} == {0.0}


def run_of(system: str, *ttfts_s: float) -> Run:
    """The first request is a first turn."""
    samples = [
        Sample(min(at, 1), 100, 60, 30, 20, 10, ttft_s, 2 * ttft_s, ())
        for at, ttft_s in enumerate(ttfts_s)
    ]
    return Run(system, 0, samples, 2.0 * sum(ttfts_s), 1.0)


def test_ratios_are_of_the_same_request_and_leave_first_turns_out() -> None:
    limit = [run_of("limit", 9.0, 1.0, 2.0, 4.0)]
    ours = [run_of("tiered", 1.0, 3.0, 2.0, 6.0)]
    assert ratios(ours, limit) == [3.0, 1.0, 1.5]
    rows = [row(limit, limit, 0.0), row(ours, limit, 0.0)]
    assert rows[1]["ttft_by_limit_p50"] == 1.5
    assert rows[1]["weighted_prefill_tokens"] == 4 * 40
    assert "| 1.50x | 1.50x |" in table(rows), "p99 by p99 is about 1.5, the median ratio is 1.5"
    assert row(ours, None, 0.0)["ttft_by_limit_p50"] is None
