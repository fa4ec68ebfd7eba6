"""The simulated disk: the disk tier's own budget, segments and reclaim, without files."""

from __future__ import annotations

import random
from array import array

import pytest

from tiered_kv.core.errors import TieredKVError
from tiered_kv.core.ids import PageHash
from tiered_kv.forest.key import namespace_hash, page_hashes
from tiered_kv.simulation import disk as simulated
from tiered_kv.simulation.disk import SimulatedDisk
from tiered_kv.tiers.alignment import round_up
from tiered_kv.tiers.disk.budget import Budget
from tiered_kv.tiers.disk.catalog import Catalog
from tiered_kv.tiers.disk.record import BLOCK_BYTES

PAGE_BYTES = 1 << 20
RECORD_BYTES = BLOCK_BYTES + round_up(PAGE_BYTES)


def pages(first: int, n: int) -> list[PageHash]:
    return page_hashes(namespace_hash("test"), array("q", range(first, first + n)), 1)


def fill(disk: SimulatedDisk, n: int, first: int = 10_000) -> None:
    for at in range(first, first + n, 4):
        assert disk.put(pages(at, 4)) == 4


def test_leading_pages_are_known_and_none_is_stored_twice() -> None:
    disk = SimulatedDisk(100 * PAGE_BYTES, PAGE_BYTES)
    names = pages(0, 10)
    assert disk.known(names) == 0
    assert disk.put(names[:6]) == 6
    assert disk.put(names[:8]) == 8
    assert disk.known(names) == 8
    assert disk.known(names[1:]) == 7
    assert len(disk) == 8
    assert disk.drain_dropped() == []


@pytest.mark.parametrize("n_pages", [40, 152, 600])
def test_it_stays_within_the_budget_and_gives_whole_segments_up(n_pages: int) -> None:
    capacity = 100 * PAGE_BYTES
    budget = Budget(capacity)
    slots = budget.slots_per_segment(RECORD_BYTES)
    most = budget.segment_space // budget.cost(RECORD_BYTES, slots) * slots
    disk = SimulatedDisk(capacity, PAGE_BYTES)
    fill(disk, n_pages)
    assert len(disk) <= most
    assert len(disk) >= min(n_pages, most - 9 * slots)
    dropped = disk.drain_dropped()
    assert dropped is not None
    assert len(dropped) == n_pages - len(disk)
    assert not any(disk.known([name]) for name in dropped)


def test_what_is_used_stays_and_the_oldest_goes() -> None:
    disk = SimulatedDisk(100 * PAGE_BYTES, PAGE_BYTES)
    used, unused = pages(0, 4), pages(100, 4)
    disk.put(used)
    fill(disk, 12, first=5000)  # In another segment: what is used keeps its neighbours, too.
    disk.put(unused)
    for n in range(60):
        fill(disk, 4, first=10_000 + 100 * n)
        disk.touch(used)
    assert disk.known(used) == 4
    assert disk.known(unused) == 0


def test_a_page_that_was_read_once_survives_the_reclaim_of_its_segment() -> None:
    disk = SimulatedDisk(100 * PAGE_BYTES, PAGE_BYTES)
    names = pages(0, 8)
    disk.put(names)
    disk.touch(names[:1])
    n = 0
    while disk.known(names[1:2]):
        n += 1
        fill(disk, 4, first=10_000 + 100 * n)
    assert disk.known(names[:1]) == 1
    assert not any(disk.known([name]) for name in names[1:])


def test_a_disk_too_small_for_two_pages_is_refused() -> None:
    with pytest.raises(TieredKVError, match="too small"):
        SimulatedDisk(PAGE_BYTES, PAGE_BYTES)


class CatalogAtOnce(Catalog):
    def note_uses(self) -> None:
        """They are noted."""


@pytest.mark.parametrize("seed", range(8))
def test_uses_noted_late_change_nothing(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    choose = random.Random(seed)
    capacity = choose.choice([40, 100, 300]) * PAGE_BYTES
    late = SimulatedDisk(capacity, PAGE_BYTES)
    monkeypatch.setattr(simulated, "LateCatalog", CatalogAtOnce)
    disks = (late, SimulatedDisk(capacity, PAGE_BYTES))
    n_dropped = 0
    for _ in range(300):
        names = pages(choose.randrange(900), choose.randrange(1, 25))
        if choose.random() < 0.5:
            stored, as_many = [disk.put(names) for disk in disks]
            assert stored == as_many
        else:
            for disk in disks:
                disk.touch(names)
        dropped, the_same = [disk.drain_dropped() for disk in disks]
        assert dropped == the_same
        n_dropped += len(dropped or ())
    assert n_dropped > 0
