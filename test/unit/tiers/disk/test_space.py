"""The byte budget: never exceeded, reclaimed by whole segments, kind to pages that are read."""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from disk_builders import (
    MIB,
    NAMESPACE,
    PAGE_BYTES,
    disk_usage,
    page_hash,
    read,
    readable,
    segment_files,
    write,
)

from tiered_kv.tiers.disk.budget import Budget
from tiered_kv.tiers.disk.reclaim import choose_survivors, choose_victim
from tiered_kv.tiers.disk.record import BLOCK_BYTES
from tiered_kv.tiers.disk.segment import Segment
from tiered_kv.tiers.disk.store import DiskStore

OpenStore = Callable[..., DiskStore]
SMALL_PAGE_BYTES = 12 << 10


class UsageWatch:
    """Measures the directory again and again while a test runs."""

    def __init__(self, directory: Path) -> None:
        self.highest = 0
        self.samples = 0
        self._directory = directory
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.highest = max(self.highest, disk_usage(self._directory))
            self.samples += 1
            self._stop.wait(0.001)

    def __enter__(self) -> UsageWatch:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join()


@pytest.mark.parametrize("capacity_bytes", [3 * MIB, 9 * MIB, 20 * MIB + 12_345])
@pytest.mark.parametrize("page_bytes", [1000, 23_040, 300_000])
def test_budget_holds_under_churn(
    open_store: OpenStore, directory: Path, capacity_bytes: int, page_bytes: int
) -> None:
    """Several times the budget is written; `du` never shows more than the budget."""
    store = open_store(capacity_bytes=capacity_bytes)
    ns = store.namespace(NAMESPACE, page_bytes)
    choose = random.Random(1)
    n_batches = 40
    per_batch = max(3 * capacity_bytes // (ns.slot_bytes + BLOCK_BYTES) // n_batches, 1)
    with UsageWatch(directory) as usage:
        for batch in range(n_batches):
            seeds = range(batch * per_batch, (batch + 1) * per_batch)
            assert write(ns, seeds) == per_batch
            assert read(ns, [choose.choice(seeds)]) <= 1
            assert disk_usage(directory) <= capacity_bytes
            assert store.stats().bytes_on_disk <= capacity_bytes
    assert usage.samples > 10
    assert usage.highest <= capacity_bytes
    stats = store.stats()
    assert stats.reclaimed_segments > 0
    assert stats.dropped_pages + stats.pages == stats.writes
    assert stats.checksum_failures == stats.io_errors == 0
    # The budget is there to be used: most of it holds pages.
    assert stats.pages * (ns.slot_bytes + BLOCK_BYTES) > 0.45 * capacity_bytes


def test_budget_holds_with_mixed_page_sizes(open_store: OpenStore, directory: Path) -> None:
    """Segments change their record size when another model needs the room."""
    capacity_bytes = 12 * MIB
    store = open_store(capacity_bytes=capacity_bytes)
    spaces = [
        store.namespace(hashlib.sha256(b"%d" % n).digest(), n) for n in (4096, 50_000, 400_000)
    ]
    choose = random.Random(9)
    written: list[int] = []
    with UsageWatch(directory) as usage:
        for step in range(90):
            ns = spaces[(step // 18) % 3]
            seeds = range(step * 1000, step * 1000 + choose.randint(1, 2_000_000 // ns.page_bytes))
            write(ns, seeds)
            written += seeds
            assert read(ns, [seeds[0]]) == 1
    assert usage.highest <= capacity_bytes
    assert store.stats().reclaimed_segments > 10
    assert all(len(ns) > 0 for ns in spaces[:2])
    store.close()
    store = open_store(capacity_bytes=capacity_bytes)
    for ns_id, n in ((hashlib.sha256(b"%d" % n).digest(), n) for n in (4096, 50_000, 400_000)):
        ns = store.namespace(ns_id, n)
        stored = [seed for seed in written if ns.contains(page_hash(seed))]
        assert len(readable(ns, stored)) == len(ns)


def test_a_batch_larger_than_the_budget(open_store: OpenStore, directory: Path) -> None:
    store = open_store(capacity_bytes=8 * MIB)
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    assert write(ns, range(300)) == 300
    assert disk_usage(directory) <= 8 * MIB
    assert len(readable(ns, range(300))) == len(ns) > 50


def test_pages_that_are_read_stay(open_store: OpenStore) -> None:
    """Hot pages lie scattered among pages that nobody wants: they are carried over."""
    store = open_store(capacity_bytes=6 * MIB)
    ns = store.namespace(NAMESPACE, SMALL_PAGE_BYTES)
    hot = list(range(10))
    for seed in hot:
        write(ns, [seed, *range(100 * seed + 100, 100 * seed + 119)])
    for first in range(2000, 5000, 20):
        write(ns, range(first, first + 20))
        assert read(ns, hot) == 10
    assert store.stats().moved_pages >= 10
    assert store.stats().dropped_pages > 2000


@pytest.mark.parametrize("touched", [True, False])
def test_pages_that_are_in_use_elsewhere_stay(open_store: OpenStore, touched: bool) -> None:
    """They are never read from disk: whoever uses them says so."""
    ns = open_store(capacity_bytes=6 * MIB).namespace(NAMESPACE, SMALL_PAGE_BYTES)
    in_use = list(range(10))
    write(ns, [*in_use, *range(10, 20)])
    for first in range(2000, 4000, 20):
        write(ns, range(first, first + 20))
        if touched:
            ns.touch([*map(page_hash, in_use), page_hash(999_999)])
    assert readable(ns, in_use) == (in_use if touched else [])


def test_the_least_recently_used_go_first(open_store: OpenStore) -> None:
    store = open_store(capacity_bytes=6 * MIB)
    ns = store.namespace(NAMESPACE, SMALL_PAGE_BYTES)
    for seed in range(1000):
        write(ns, [seed])
    kept = readable(ns, range(1000))
    assert kept == list(range(1000 - len(kept), 1000))


def test_smaller_budget_on_reopen(open_store: OpenStore, directory: Path) -> None:
    store = open_store(capacity_bytes=64 * MIB)
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    for first in range(0, 900, 30):
        write(ns, range(first, first + 30))
    store.close()
    store = open_store(capacity_bytes=16 * MIB)
    assert disk_usage(directory) <= 16 * MIB
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    kept = readable(ns, range(900))
    assert 0 < len(kept) == len(ns)
    assert min(kept) > 600
    assert write(ns, range(2000, 2100)) == 100
    assert disk_usage(directory) <= 16 * MIB


def test_larger_budget_on_reopen(open_store: OpenStore) -> None:
    store = open_store(capacity_bytes=8 * MIB)
    write(store.namespace(NAMESPACE, PAGE_BYTES), range(60))
    store.close()
    ns = open_store(capacity_bytes=64 * MIB).namespace(NAMESPACE, PAGE_BYTES)
    assert write(ns, range(100, 700)) == 600
    assert read(ns, range(100, 700)) == 600
    assert read(ns, range(60)) == 60


def test_damaged_pages_are_not_carried_over(open_store: OpenStore, directory: Path) -> None:
    store = open_store(capacity_bytes=6 * MIB)
    ns = store.namespace(NAMESPACE, SMALL_PAGE_BYTES)
    write(ns, range(5))
    read(ns, range(5))
    with segment_files(directory)[0].open("r+b") as file:
        file.seek(BLOCK_BYTES + 2 * (BLOCK_BYTES + SMALL_PAGE_BYTES) + BLOCK_BYTES)
        file.write(b"damage")
    for seed in range(100, 600):
        write(ns, [seed])
        assert read(ns, [0, 1]) == 2
    assert not ns.contains(page_hash(2))
    assert store.stats().moved_pages > 0


def test_budget_holds_with_a_damaged_index_set_aside(
    open_store: OpenStore, directory: Path
) -> None:
    """A copy is kept for inspection only where there is room for it."""
    capacity_bytes = 4 * MIB
    store = open_store(capacity_bytes=capacity_bytes)
    ns = store.namespace(NAMESPACE, 1000)
    for first in range(0, 600, 20):
        write(ns, range(first, first + 20))
    store._gate._now = lambda: 0.0
    store._index.compact()
    index = directory / "index.sqlite"
    # Far larger than an index of this budget would be, so that ignoring it would show.
    index.write_bytes(random.Random(3).randbytes(MIB))
    store._index._db.execute("PRAGMA shrink_memory")
    assert write(ns, range(5000, 5020)) == 0
    store._gate._now = lambda: 100.0
    for first in range(1000, 3000, 20):
        write(ns, range(first, first + 20))
    assert not (directory / "index.sqlite.corrupt").exists()
    assert disk_usage(directory) <= capacity_bytes
    assert len(readable(ns, range(3000))) == len(ns) > 50


# -- policy


def segment_of_pages(number: int, access: list[int], slots: int = 8) -> Segment:
    segment = Segment(number, Path(f"{number}.seg"), 8192, slots)
    for slot, when in enumerate(access):
        segment.put(slot, 1, page_hash(number * 100 + slot), when)
    return segment


def test_victim_is_empty_before_old_before_new() -> None:
    empty = segment_of_pages(3, [])
    old = segment_of_pages(2, [100, 110, 120])
    new = segment_of_pages(1, [900, 910, 920])
    assert choose_victim([new, old, empty], now=1000) is empty
    assert choose_victim([new, old], now=1000) is old
    assert choose_victim([], now=1000) is None


def test_victim_of_one_age_is_the_emptier() -> None:
    full = segment_of_pages(1, [500] * 8)
    sparse = segment_of_pages(2, [500] * 2)
    assert choose_victim([full, sparse], now=1000) is sparse
    # However long the store has been running.
    full = segment_of_pages(1, [10**12 + 500] * 8)
    sparse = segment_of_pages(2, [10**12 + 500] * 2)
    assert choose_victim([full, sparse], now=10**12 + 1000) is sparse


def test_pages_in_use_protect_their_segment() -> None:
    half_hot = segment_of_pages(1, [1000] * 4 + [100] * 4)
    cold = segment_of_pages(2, [200] * 8)
    cool = segment_of_pages(3, [400] * 8)
    assert choose_victim([half_hot, cold, cool], now=1000) is cold


def test_value_counts_bytes_not_pages() -> None:
    """A few large pages are worth as much as many small ones of the same age."""
    large = Segment(1, Path("1.seg"), 1 << 20, 2)
    small = Segment(2, Path("2.seg"), 8192, 256)
    for slot in range(2):
        large.put(slot, 1, page_hash(slot), 600)
    for slot in range(256):
        small.put(slot, 1, page_hash(slot), 500)
    assert choose_victim([large, small], now=1000) is small


def test_survivors_are_the_latest_read() -> None:
    # Odd values carry the mark "read".
    segment = segment_of_pages(1, [11, 20, 31, 40, 51, 61, 70, 81])
    assert choose_survivors(segment, room=8) == [5, 7]
    assert choose_survivors(segment, room=1) == [7]
    assert choose_survivors(segment, room=0) == []


def test_segment_sizes() -> None:
    for capacity in (3 * MIB, 64 * MIB, 10 << 30, 1 << 40, 20 << 40):
        budget = Budget(capacity)
        slots = budget.slots_per_segment(68 << 10)
        n_segments = budget.segment_space // budget.cost(68 << 10, slots)
        assert 2 <= n_segments <= 512
        assert n_segments * budget.cost(68 << 10, slots) + budget.reserve_bytes <= capacity
