"""The byte budget: never exceeded, reclaimed by whole segments, kind to pages that are read."""

from __future__ import annotations

import gc
import hashlib
import random
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
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
from hypothesis import given
from hypothesis import strategies as st

from tiered_kv.tiers.disk import reclaimer
from tiered_kv.tiers.disk.ages import Ages
from tiered_kv.tiers.disk.budget import Budget
from tiered_kv.tiers.disk.catalog import Catalog
from tiered_kv.tiers.disk.index import size_of_aside
from tiered_kv.tiers.disk.reclaim import choose_survivors, choose_victim
from tiered_kv.tiers.disk.record import BLOCK_BYTES
from tiered_kv.tiers.disk.segment import Segment
from tiered_kv.tiers.disk.segment_board import SegmentBoard
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
    assert len(spaces[1]) > 0
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


def test_pages_that_are_read_stay(open_store: OpenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hot pages lie scattered among pages that nobody wants: they are carried over."""
    # On a busy machine writers would not wait until they were.
    monkeypatch.setattr(reclaimer, "PATIENCE_S", 60.0)
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
    store._index.fold_log()
    index = directory / "index.sqlite"
    # So large that there is no room for it whatever was reclaimed by then.
    with index.open("r+b") as file:
        file.truncate(capacity_bytes)  # Never any smaller, whenever the keeper finds out.
        file.write(random.Random(3).randbytes(capacity_bytes))
    store._index._db.execute("PRAGMA shrink_memory")
    # Whether the write finds out or the keeper, which then has mended it already.
    assert write(ns, range(5000, 5020)) in (0, 20)
    store._gate._now = lambda: 100.0
    for first in range(1000, 3000, 20):
        write(ns, range(first, first + 20))
    # If the keeper wrote a row a moment ago SQLite cuts the file when it closes it: that fits.
    assert size_of_aside(directory) < capacity_bytes / 4
    assert disk_usage(directory) <= capacity_bytes
    assert len(readable(ns, range(3000))) == len(ns) > 50


# -- policy


def segments_of(*accesses: list[int], slots: int = 8) -> tuple[list[Segment], Ages]:
    """Segments 1, 2, ... that hold pages with these accesses, and ages that tell them apart."""
    ages = Ages()
    ages.restart(np.array([a >> 1 for some in accesses for a in some], np.uint64))
    segments = []
    for number, some in enumerate(accesses, 1):
        segment = Segment(number, 8192, slots, ages)
        for slot, when in enumerate(some):
            segment.put(slot, 1, page_hash(number * 100 + slot), when)
        segments.append(segment)
    return segments, ages


def choose(segments: Sequence[Segment], ages: Ages, now: int) -> Segment | None:
    """The same whether they are on the board or not."""
    off = choose_victim(SegmentBoard(threading.Lock()), segments, ages, now)
    board = SegmentBoard(threading.Lock())
    for segment in segments:
        board.add(segment)
    on = choose_victim(board, [], ages, now)
    for segment in segments:
        board.remove(segment)
    assert on is off
    return on


def test_victim_is_empty_before_old_before_new() -> None:
    (new, old, empty), ages = segments_of([900, 910, 920], [100, 110, 120], [])
    assert choose([new, old, empty], ages, now=500) is empty
    assert choose([new, old], ages, now=500) is old
    assert choose([], ages, now=500) is None


@pytest.mark.parametrize("long_ago", [0, 10**12])
def test_victim_of_one_age_is_the_emptier(long_ago: int) -> None:
    """However long the store has been running."""
    (full, sparse), ages = segments_of([long_ago + 500] * 8, [long_ago + 500] * 2)
    assert choose([full, sparse], ages, now=long_ago // 2 + 500) is sparse


def test_of_equal_segments_the_one_filled_first_goes() -> None:
    (one, two), ages = segments_of([500] * 8, [500] * 8)
    one.filled_at, two.filled_at = 7, 3
    assert choose([one, two], ages, now=500) is two


def test_pages_in_use_protect_their_segment() -> None:
    (half_hot, cold, cool), ages = segments_of([1000] * 4 + [100] * 4, [200] * 8, [400] * 8)
    assert choose([half_hot, cold, cool], ages, now=500) is cold


def test_a_page_that_nobody_asks_for_does_not_outweigh_those_in_use() -> None:
    now = 10**6
    (mostly_hot, cool), ages = segments_of([2 * now] * 7 + [2], [18 * now // 10] * 8)
    assert choose([mostly_hot, cool], ages, now) is cool


def test_value_counts_bytes_not_pages() -> None:
    """A few large pages are worth as much as many small ones of the same age."""
    ages = Ages()
    ages.restart(np.array([250] * 8 + [300] * 8, np.uint64))
    large = Segment(1, 1 << 20, 2, ages)
    small = Segment(2, 8192, 256, ages)
    for slot in range(2):
        large.put(slot, 1, page_hash(slot), 600)
    for slot in range(256):
        small.put(slot, 1, page_hash(slot), 500)
    assert choose([large, small], ages, now=500) is small


def test_survivors_are_the_latest_read() -> None:
    # Odd values carry the mark "read".
    (segment,), _ = segments_of([11, 20, 31, 40, 51, 61, 70, 81])
    assert choose_survivors(segment, room=8) == [5, 7]
    assert choose_survivors(segment, room=1) == [7]
    assert choose_survivors(segment, room=0) == []


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["put", "drop", "use", "pass", "offer", "withdraw"]), st.integers(0, 7)
        )
    )
)
def test_pages_are_counted_by_age(steps: list[tuple[str, int]]) -> None:
    """What is kept up to date as pages come and go is what counting anew finds."""
    catalog = Catalog()
    segment = Segment(0, 8192, 8, catalog.ages)
    catalog.add_segment(segment)
    entries = catalog.open_namespace(NAMESPACE, 4096)
    catalog.register(entries)
    for step, slot in steps:
        held = bool(segment.access[slot])
        if step == "put" and not held:
            catalog.put(entries, page_hash(slot), segment, slot, catalog.tick() << 1)
        elif step == "drop" and held:
            catalog.drop_pages(segment, [slot])
        elif step == "use" and held:
            segment.touch(slot, catalog.tick())
        elif step == "pass":
            catalog.begin_epoch()
        elif step == "offer":
            catalog.offer(segment)
        elif step == "withdraw":
            catalog.withdraw(segment)
        kept = segment.counts
        segment.recount()
        assert segment.counts == kept
        assert sum(kept) == segment.live == entries.n_pages == len(catalog.table)


def test_segments_hold_nothing_for_the_collector() -> None:
    """There are twenty thousand in ten terabytes, and its full passes stop every thread."""
    (one, two), _ = segments_of([500] * 8, [500] * 8)
    board = SegmentBoard(threading.Lock())
    board.add(one)
    board.add(two)
    shared = [{id(o) for o in gc.get_referents(s) if gc.is_tracked(o)} for s in (one, two)]
    assert shared[0] == shared[1]


def test_many_segments_are_weighed_at_once() -> None:
    """More than one block of rows, some of them vacant again."""
    everybody, ages = segments_of(*([2 * n, 2 * n + 2] for n in range(1, 2500)))
    board = SegmentBoard(threading.Lock())
    assert board.is_empty
    for segment in everybody:
        board.add(segment)
    for n in range(2499):
        victim = choose_victim(board, [], ages, now=3000)
        assert victim is not None
        if n % 7 == 0:
            # Those told apart by the epochs are in order; within one, who was filled first goes.
            assert abs(victim.number - n) <= 2500 / 16 + 1
        board.remove(victim)
    assert board.is_empty
    assert choose_victim(board, [], ages, now=3000) is None


def test_segment_sizes() -> None:
    for capacity in (3 * MIB, 64 * MIB, 10 << 30, 1 << 40, 20 << 40):
        budget = Budget(capacity)
        slots = budget.slots_per_segment(68 << 10)
        cost = budget.cost(68 << 10, slots)
        n_segments = budget.segment_space // cost
        assert n_segments >= 2
        assert n_segments * cost + budget.reserve_bytes <= capacity
        assert cost <= 512 * MIB, "however large the budget"
        assert budget.spare_segments(68 << 10) * cost <= capacity / 20


def test_large_pages_leave_room_for_survivors() -> None:
    """In segments of two or three pages none could ever be carried over."""
    assert Budget(64 * MIB).slots_per_segment(1 * MIB) >= 7
    assert Budget(8 * MIB).slots_per_segment(68 << 10) >= 7
