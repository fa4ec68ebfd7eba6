"""How full the disk tier is, for whoever may not wait for its statistics: they look at memory."""

from __future__ import annotations

import pytest
from disk_builders import wait_until
from tier_builders import OpenTier, pages_of, write

from tiered_kv.tiers.disk.memory_pressure import MemoryPressure


def test_it_says_what_the_statistics_say_and_reads_nothing(
    open_tier: OpenTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = open_tier()
    assert tier.fill() == (0, False)
    assert write(pages_of(tier), range(7)) == 7
    wait_until(lambda: tier.stats().pages == 7)
    samples: list[float] = []
    monkeypatch.setattr(MemoryPressure, "_take_sample", lambda _, now_s: samples.append(now_s))
    for _ in range(20):
        assert tier.fill() == (7, False)
    assert samples == []


def test_without_a_store_it_takes_no_writes(open_tier: OpenTier) -> None:
    tier = open_tier()
    tier.close(5.0)
    stats = tier.stats()
    assert tier.fill() == (stats.pages, stats.degraded)
