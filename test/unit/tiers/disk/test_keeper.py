"""The keeper: room ahead of need, beside writes; nothing that stays for ever; order of use."""

from __future__ import annotations

import hashlib
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from disk_builders import MIB, NAMESPACE, page_hash, read, readable, segment_files, write

from tiered_kv.tiers.disk import index_upkeep, stall_watch
from tiered_kv.tiers.disk import segment_files as segment_files_module
from tiered_kv.tiers.disk.io_ops import IoOps
from tiered_kv.tiers.disk.namespace import DiskNamespace
from tiered_kv.tiers.disk.segment import SegmentState
from tiered_kv.tiers.disk.store import DiskStore

OpenStore = Callable[..., DiskStore]
PAGE_BYTES = 12 << 10
CAPACITY = 16 * MIB
"""32 segments of 31 pages, one of them free ahead of need."""


def wait_until(is_so: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def states(store: DiskStore, state: SegmentState) -> int:
    segments = list(store._catalog.segments.values())
    return sum(segment.state is state for segment in segments)


def fill(store: DiskStore, ns: DiskNamespace) -> int:
    """Write until something had to be reclaimed; returns the seed to go on with."""
    seed = 0
    while not store.stats().reclaimed_segments:
        assert write(ns, range(seed, seed + 10)) == 10
        seed += 10
    return seed


class HeldReads(IoOps):
    """Reads wait while they are held."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.n_waiting = 0

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self.n_waiting += 1
        self.go.wait()
        self.n_waiting -= 1
        return super().preadv(fd, buffers, offset)


def test_room_is_made_ahead_of_need(open_store: OpenStore) -> None:
    store = open_store(capacity_bytes=CAPACITY)
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    seed = fill(store, ns)
    for first in range(seed, seed + 300, 10):
        assert write(ns, range(first, first + 10)) == 10
        # Whoever comes next does not wait: nobody asked for this one.
        wait_until(lambda: states(store, SegmentState.FREE) >= 1)
    assert store.stats().dropped_pages > 200


def test_writes_go_on_while_pages_are_moved(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk takes its time to read what is to be carried over: nobody waits for that, and no
    lock is held meanwhile."""
    monkeypatch.setattr(stall_watch, "STALL_AFTER_S", 60.0)  # The machine may be busy.
    io = HeldReads()
    store = open_store(capacity_bytes=CAPACITY, io_ops=io)
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    seed = fill(store, ns)
    wait_until(lambda: states(store, SegmentState.FREE) >= 1)
    ns.touch(ns.hashes())
    io.go.clear()
    while not io.n_waiting:
        assert write(ns, [seed]) == 1
        seed += 1
    for first in range(seed, seed + 20, 2):
        assert write(ns, range(first, first + 2)) == 2
        assert ns.contains(page_hash(first))
        store.stats()
        ns.touch([page_hash(first)])
    assert io.n_waiting, "it still moves pages"
    io.go.set()
    wait_until(lambda: states(store, SegmentState.FREE) >= 1)
    assert store.stats().moved_pages > 0


def test_who_waits_gets_the_segment_as_it_is(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If moving takes too long, pages are given up rather than writes held up."""

    class SlowReads(IoOps):
        def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
            time.sleep(0.1)
            return super().preadv(fd, buffers, offset)

    monkeypatch.setattr("tiered_kv.tiers.disk.page_mover._CHUNK_BYTES", 16 << 10)
    store = open_store(capacity_bytes=CAPACITY, io_ops=SlowReads())
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    seed = fill(store, ns)
    slowest = 0.0
    for first in range(seed, seed + 600, 30):
        ns.touch(ns.hashes())
        started = time.perf_counter()
        assert write(ns, range(first, first + 30)) == 30
        slowest = max(slowest, time.perf_counter() - started)
    # To move all seven that may survive would take 0.7 s for each of two segments.
    assert slowest < 0.7
    assert store.stats().dropped_pages > 400


# -- what nobody uses any more


def test_partly_filled_segments_of_sizes_that_nobody_uses_are_reclaimed(
    open_store: OpenStore, directory: Path
) -> None:
    store = open_store(capacity_bytes=CAPACITY)
    for n in range(8):
        other = store.namespace(hashlib.sha256(b"tried %d" % n).digest(), 4096 * (n + 5))
        assert write(other, [n]) == 1
        del other
    assert len(store._catalog.namespaces) == 8
    store.close()
    # After a restart, too: they were left partly filled by somebody else.
    store = open_store(capacity_bytes=CAPACITY)
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    for first in range(0, 3000, 30):
        write(ns, range(first, first + 30))
    wait_until(lambda: not store._catalog.emptied)
    assert {s.record_bytes for s in store._catalog.segments.values()} == {16 << 10}
    assert store.stats().pages * (16 << 10) > 0.85 * CAPACITY, "all of it serves who is there"
    assert len(store._catalog.namespaces) == len(store.namespaces()) == 1
    store.close()
    with sqlite3.connect(directory / "index.sqlite") as db:
        assert db.execute("SELECT count(*) FROM namespaces").fetchone() == (1,)
        assert db.execute("SELECT count(DISTINCT namespace) FROM runs").fetchone() == (1,)
    db.close()


def test_namespaces_without_pages_are_forgotten(open_store: OpenStore, directory: Path) -> None:
    """Thousands of weight updates: what is known does not grow with them."""
    store = open_store(capacity_bytes=8 * MIB)
    buffer = memoryview(bytes(PAGE_BYTES))
    for n in range(2500):
        ns = store.namespace(hashlib.sha256(b"weights %d" % n).digest(), PAGE_BYTES)
        assert ns.write_pages([page_hash(n)], [buffer]) == 1
        store.namespace(hashlib.sha256(b"never written %d" % n).digest(), PAGE_BYTES)
    n_pages = store.stats().pages
    assert n_pages < 550
    assert len(store.namespaces()) == n_pages
    wait_until(lambda: not store._catalog.emptied)
    assert len(store._catalog.namespaces) == n_pages
    assert len(store._catalog._by_id) <= n_pages + 2
    store.close()
    with sqlite3.connect(directory / "index.sqlite") as db:
        assert db.execute("SELECT count(*) FROM namespaces").fetchone() == (n_pages,)
    db.close()


def test_a_namespace_in_use_outlives_its_pages(open_store: OpenStore) -> None:
    store = open_store(capacity_bytes=CAPACITY)
    ns = store.namespace(NAMESPACE, PAGE_BYTES, "in service")
    write(ns, range(5))
    ns.drop_pages([page_hash(seed) for seed in range(5)])
    store._keeper.wake()
    wait_until(lambda: not store._catalog.namespaces)
    assert store.namespaces() == []
    assert write(ns, range(5)) == 5
    (found,) = store.namespaces()
    assert found.description == "in service"
    assert store.namespace(NAMESPACE, PAGE_BYTES).contains(page_hash(3))
    store.close()
    store = open_store(capacity_bytes=CAPACITY)
    assert read(store.namespace(NAMESPACE, PAGE_BYTES), range(5)) == 5
    assert store.namespaces()[0].description == "in service"


def test_few_files_are_open(
    open_store: OpenStore, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segment_files_module, "MOST_OPEN", 4)
    store = open_store(capacity_bytes=CAPACITY)
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    for first in range(0, 600, 30):
        write(ns, range(first, first + 30))
    assert len(segment_files(directory)) > 15
    for seed in range(0, 600, 3):
        assert read(ns, [seed]) == 1
        links = [fd.readlink() for fd in Path("/proc/self/fd").iterdir() if fd.exists()]
        assert len([link for link in links if link.suffix == ".seg"]) <= 4


# -- the order of use


USE_AND_DIE = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from disk_builders import NAMESPACE, page_hash, read, write
from tiered_kv.tiers.disk import index_upkeep, stall_watch
from tiered_kv.tiers.disk.store import DiskStore
index_upkeep.SAVE_S = 0.1
store = DiskStore.open(Path(sys.argv[1]), capacity_bytes=16 << 20)
ns = store.namespace(NAMESPACE, 12 << 10)
for first in range(0, 600, 30):
    write(ns, range(first, first + 30))
for seed in range(0, 90, 5):
    read(ns, [seed])
while any(segment.touched for segment in store._catalog.segments.values()):
    time.sleep(0.01)
time.sleep(0.2)
os.kill(os.getpid(), 9)
"""


def test_order_of_use_survives_a_kill(open_store: OpenStore, directory: Path) -> None:
    command = [sys.executable, "-c", USE_AND_DIE, str(directory), str(Path(__file__).parent)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == -9, run.stderr
    ns = open_store(capacity_bytes=CAPACITY).namespace(NAMESPACE, PAGE_BYTES)
    # Until most that was there has made way.
    for first in range(1000, 1800, 30):
        write(ns, range(first, first + 30))
    read_once, never_read = range(0, 90, 5), [s for s in range(90) if s % 5]
    assert len(readable(ns, read_once)) > 0.6 * len(read_once)
    assert len(readable(ns, never_read)) < 0.5 * len(never_read)


def test_saving_the_order_of_use_costs_a_row_for_each_segment(open_store: OpenStore) -> None:
    store = open_store()
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    write(ns, range(1000))
    read(ns, range(0, 1000, 2))
    n_rows = 0
    save = store._index.save_recency

    def counted(rows: Sequence[tuple[int, bytes, int]]) -> None:
        nonlocal n_rows
        n_rows += len(rows)
        save(rows)

    store._index.save_recency = counted  # type: ignore[method-assign,assignment]
    n_segments = store.stats().segments - states(store, SegmentState.FREE)
    store.close()
    assert n_rows == n_segments < 10
    store = open_store()
    segments = store._catalog.segments.values()
    was_read = {
        segment.page_hash(slot)
        for segment in segments
        for slot in segment.live_slots()
        if segment.access[slot] & 1
    }
    assert was_read == {page_hash(seed) for seed in range(0, 1000, 2)}


def test_it_is_saved_about_once_a_minute(open_store: OpenStore) -> None:
    assert index_upkeep.SAVE_S == 60.0
    store = open_store()
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    write(ns, range(10))
    read(ns, [3])
    (segment,) = store._catalog.segments.values()
    time.sleep(0.1)
    assert segment.touched, "not at once"
    store._upkeep.next_save_at = 0.0
    store._keeper.wake()
    wait_until(lambda: not segment.touched)
    assert store._index.segments()[0].was_read


def test_an_error_that_nobody_foresaw_keeps_nothing_else_from_being_done(
    open_store: OpenStore, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(capacity_bytes=CAPACITY)
    ns = store.namespace(NAMESPACE, PAGE_BYTES)

    def fails() -> bool:
        raise KeyError("injected")

    urgent = store._keeper._jobs[1]
    urgent.run = fails
    seed = fill(store, ns)  # Who waits for room gets it.
    store.clear()
    wait_until(lambda: not store._catalog.segments and store.stats().bytes_on_disk < MIB)
    assert write(ns, range(seed, seed + 10)) == 10
    assert urgent.pause_s
    assert "nobody foresaw" in caplog.text
