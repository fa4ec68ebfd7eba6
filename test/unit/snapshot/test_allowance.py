"""A snapshot leaves off when its time is spent."""

from __future__ import annotations

from tiered_kv.snapshot.allowance import Allowance


def test_items_end_when_the_share_is_spent() -> None:
    now_s = 0.0
    allowance = Allowance(lambda: now_s, 1.0)
    seen = 0
    for _ in allowance.spend(range(1000), 0.5):
        seen += 1
        now_s += 0.01
    assert 50 <= seen <= 54
    assert list(allowance.spend(range(100), 0.5)) == []
    assert list(allowance.spend(range(100), 0.5, at_least=5)) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert len(list(allowance.spend(range(100), 1.0))) == 100
    assert allowance.spent_s() == now_s


def test_all_of_them_if_there_is_time() -> None:
    assert list(Allowance(lambda: 0.0, 1.0).spend(range(100), 0.1)) == list(range(100))
