"""How long ago a logical tick was, as far as that was noted."""

from __future__ import annotations

import pytest

from tiered_kv.snapshot.tick_times import NOTES_MAX, TickTimes


def test_an_age_is_since_the_first_note_behind_it() -> None:
    times = TickTimes()
    for tick, now_s in ((0, 0.0), (5, 10.0), (9, 20.0)):
        times.note(tick, now_s)
    assert [times.age_s(tick, 100.0) for tick in (0, 1, 5, 6, 9)] == [100, 90, 90, 80, 80]
    # Not noted yet: within the last second.
    assert times.age_s(10, 100.0) == 0


def test_what_was_used_does_not_grow_younger_while_nothing_is_used() -> None:
    times = TickTimes()
    times.note(5, 10.0)
    for now_s in range(11, 50):
        times.note(5, float(now_s))
    assert times.age_s(5, 50.0) == 40
    times.note(6, 50.0)
    assert times.age_s(6, 51.0) == 1


def test_notes_are_bounded_and_old_ones_are_coarser() -> None:
    times = TickTimes()
    n = 30 * NOTES_MAX
    for at in range(n):
        times.note(at, float(at))
        assert len(times._ticks) <= NOTES_MAX
    assert times.age_s(n - 1, float(n)) == 1
    for tick in (0, n // 2, n - 100):
        age_s = times.age_s(tick, float(n))
        assert age_s <= n - tick
        assert age_s == pytest.approx(n - tick, rel=0.03, abs=2)
