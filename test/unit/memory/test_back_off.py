"""What failed is tried again after a while, twice as long each time, and at once when it works."""

from __future__ import annotations

from tiered_kv.memory.back_off import FIRST_S, LONGEST_S, BackOff


def test_longer_after_each_failure_and_never_too_long() -> None:
    back_off, now_s, rests = BackOff(), 100.0, []
    assert back_off.is_well
    assert back_off.is_over(0.0)
    for _ in range(12):
        back_off.failed(now_s)
        assert not back_off.is_well
        rest_s = next(n / 8 for n in range(1000) if back_off.is_over(now_s + n / 8))
        rests.append(rest_s)
        now_s += rest_s
    assert rests == [min(FIRST_S * 2**n, LONGEST_S) for n in range(12)]


def test_what_works_is_as_good_as_new() -> None:
    back_off = BackOff()
    for _ in range(5):
        back_off.failed(10.0)
    back_off.worked()
    assert back_off.is_well
    assert back_off.is_over(10.0)
    back_off.failed(20.0)
    assert not back_off.is_over(20.0 + FIRST_S / 2)
    assert back_off.is_over(20.0 + FIRST_S)
