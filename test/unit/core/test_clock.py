"""The logical clock counts its own ticks and nothing else."""

from __future__ import annotations

from tiered_kv.core.clock import LogicalClock


def test_every_tick_is_one_more() -> None:
    clock = LogicalClock()
    assert clock.now() == 0
    assert [clock.tick() for _ in range(3)] == [1, 2, 3]
    assert clock.now() == 3
