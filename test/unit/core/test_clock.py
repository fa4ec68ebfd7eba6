"""The logical clock counts its own ticks and nothing else."""

from __future__ import annotations

from tiered_kv.core.clock import Clock, LogicalClock


def test_every_tick_is_one_more() -> None:
    clock = LogicalClock()
    assert clock.now() == 0
    assert [clock.tick() for _ in range(3)] == [1, 2, 3]
    assert clock.now() == 3


def test_it_is_a_clock() -> None:
    clock: Clock = LogicalClock()
    assert clock.now() == 0
