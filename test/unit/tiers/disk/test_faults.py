"""Operating errors, injected below the store: the tier degrades, says so once, and comes back."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from disk_builders import MIB, NAMESPACE, PAGE_BYTES, disk_usage, page_hash, read, readable, write

from tiered_kv.tiers.disk.io_ops import IoOps
from tiered_kv.tiers.disk.io_path import IoMode
from tiered_kv.tiers.disk.namespace import DiskNamespace
from tiered_kv.tiers.disk.record import BLOCK_BYTES
from tiered_kv.tiers.disk.store import DiskStore

OpenStore = Callable[..., DiskStore]


class FaultyIo(IoOps):
    """Real system calls that fail, fall short or stall when told to."""

    def __init__(self) -> None:
        self.write_error: int | None = None
        self.read_error: int | None = None
        self.allocate_error: int | None = None
        self.read_error_at: int | None = None
        self.most_bytes: int | None = None
        self.unblocked = threading.Event()
        self.unblocked.set()
        self.n_writes = 0

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self.unblocked.wait()
        self.n_writes += 1
        if self.write_error is not None:
            raise OSError(self.write_error, os.strerror(self.write_error))
        return super().pwritev(fd, self._cut(buffers), offset)

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self.unblocked.wait()
        if self.read_error is not None:
            raise OSError(self.read_error, os.strerror(self.read_error))
        end = offset + sum(map(len, buffers))
        if self.read_error_at is not None and offset <= self.read_error_at < end:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().preadv(fd, self._cut(buffers), offset)

    def allocate(self, fd: int, n_bytes: int) -> None:
        if self.allocate_error is not None:
            raise OSError(self.allocate_error, os.strerror(self.allocate_error))
        super().allocate(fd, n_bytes)

    def _cut(self, buffers: Sequence[memoryview]) -> Sequence[memoryview]:
        if self.most_bytes is None:
            return buffers
        cut, room = [], self.most_bytes
        for buffer in buffers:
            if room > 0:
                cut.append(buffer[:room])
                room -= len(cut[-1])
        return cut


class Time:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def io() -> FaultyIo:
    return FaultyIo()


@pytest.fixture
def clock() -> Time:
    return Time()


@pytest.fixture(params=[None, bytes(range(32))], ids=["plain", "encrypted"])
def store(
    request: pytest.FixtureRequest,
    open_store: OpenStore,
    io: FaultyIo,
    clock: Time,
    io_mode: IoMode,
) -> DiskStore:
    store = open_store(io_ops=io, io_mode=io_mode, key=request.param)
    store._gate._now = clock
    return store


@pytest.fixture
def ns(store: DiskStore) -> DiskNamespace:
    namespace = store.namespace(NAMESPACE, PAGE_BYTES)
    write(namespace, range(20))
    return namespace


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_failing_writes_degrade_and_recover(
    store: DiskStore, ns: DiskNamespace, io: FaultyIo, clock: Time, code: int,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO, logger="tiered_kv")
    io.write_error = code
    assert write(ns, [100]) == 0
    assert store.stats().degraded
    assert store.stats().io_errors == 1
    tried = io.n_writes
    for _ in range(50):
        assert write(ns, [101]) == 0
    assert io.n_writes == tried, "the disk is left alone during the pause"
    assert read(ns, range(20)) == 20, "reads go on"
    clock.now_s = 1.1
    assert write(ns, [102]) == 0
    assert io.n_writes > tried, "one write tries again after the pause"
    io.write_error = None
    assert write(ns, [103]) == 0
    clock.now_s = 3.2
    assert write(ns, [104]) == 1
    assert not store.stats().degraded
    assert write(ns, [100]) == 1
    assert readable(ns, [*range(20), *range(100, 110)]) == [*range(20), 100, 104]
    entering, leaving = caplog.messages
    assert "stops writing" in entering
    assert os.strerror(code) in entering
    assert "writes again after 3.2 s" in leaving


def test_disk_full_when_a_segment_is_created(
    open_store: OpenStore, io: FaultyIo, clock: Time, directory: Path
) -> None:
    store = open_store(io_ops=io)
    store._gate._now = clock
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    before = disk_usage(directory)
    io.allocate_error = errno.ENOSPC
    assert write(ns, range(5)) == 0
    assert store.stats().degraded
    assert disk_usage(directory) <= before, "no half-made segment is left"
    io.allocate_error = None
    clock.now_s = 1.0
    assert write(ns, range(5)) == 5
    assert not store.stats().degraded
    assert read(ns, range(5)) == 5


def test_error_in_the_middle_of_a_batch(open_store: OpenStore, io: FaultyIo) -> None:
    """What was written before the error is acknowledged and counted; the rest is not."""

    class FailsLater(FaultyIo):
        def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
            if self.n_writes >= 6:
                self.write_error = errno.EIO
            return super().pwritev(fd, buffers, offset)

    store = open_store(io_ops=FailsLater(), io_threads=2)
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    n_written = write(ns, range(200))
    assert 0 < n_written < 200
    assert len(readable(ns, range(200))) == n_written == store.stats().pages


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_failing_reads_are_misses(
    store: DiskStore, ns: DiskNamespace, io: FaultyIo, code: int
) -> None:
    io.read_error = code
    assert read(ns, range(20)) == 0
    assert store.stats().io_errors == 20
    assert not store.stats().degraded
    assert write(ns, [50]) == 1
    io.read_error = None
    assert read(ns, range(20)) == 20, "one failure may pass: nothing was dropped"


def test_page_that_fails_twice_is_dropped(
    store: DiskStore, ns: DiskNamespace, io: FaultyIo
) -> None:
    io.read_error_at = BLOCK_BYTES + 5 * (BLOCK_BYTES + PAGE_BYTES) + 5000
    assert read(ns, range(20)) == 5, "a bad block costs only its own page"
    assert readable(ns, range(6, 20)) == list(range(6, 20))
    assert ns.contains(page_hash(5))
    assert read(ns, [5]) == 0
    assert not ns.contains(page_hash(5))
    assert write(ns, [5]) == 1, "and is written elsewhere"
    assert read(ns, range(20)) == 20


@pytest.mark.parametrize("most_bytes", [4096, 12_288, 70_000, 100_001])
def test_short_transfers_are_completed(
    store: DiskStore, ns: DiskNamespace, io: FaultyIo, most_bytes: int, io_mode: IoMode
) -> None:
    # The kernel never cuts direct I/O off a block boundary.
    io.most_bytes = most_bytes & -BLOCK_BYTES if io_mode is IoMode.DIRECT else most_bytes
    assert write(ns, range(100, 120)) == 20
    assert read(ns, range(20)) == 20
    io.most_bytes = None
    assert read(ns, range(100, 120)) == 20
    assert store.stats().io_errors == 0


def test_transfers_that_get_nowhere(store: DiskStore, ns: DiskNamespace, io: FaultyIo) -> None:
    io.most_bytes = 0
    assert read(ns, [1]) == 0
    assert write(ns, [100]) == 0
    assert store.stats().degraded
    io.most_bytes = None
    assert read(ns, [1]) == 1


def test_stalled_disk_does_not_stall_lookups(
    store: DiskStore, ns: DiskNamespace, io: FaultyIo
) -> None:
    hashes = [page_hash(seed) for seed in range(20)]
    io.unblocked.clear()
    results: dict[str, int] = {}
    jobs = {
        "write": lambda: write(ns, range(100, 130)),
        "read": lambda: read(ns, range(20)),
    }
    threads = [
        threading.Thread(target=lambda n=name, j=job: results.update({n: j()}))
        for name, job in jobs.items()
    ]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    started = time.perf_counter()
    assert ns.count_prefix(hashes) == 20
    assert not ns.contains(page_hash(100))
    assert store.stats().pages == 20
    assert time.perf_counter() - started < 0.05
    assert not results
    io.unblocked.set()
    for thread in threads:
        thread.join()
    assert results == {"write": 30, "read": 20}


def test_closing_waits_for_operations_under_way(
    store: DiskStore, ns: DiskNamespace, io: FaultyIo
) -> None:
    io.unblocked.clear()
    results = []
    writer = threading.Thread(target=lambda: results.append(write(ns, [100])))
    writer.start()
    closer = threading.Thread(target=store.close)
    time.sleep(0.05)
    closer.start()
    time.sleep(0.05)
    assert closer.is_alive()
    io.unblocked.set()
    writer.join()
    closer.join()
    assert results == [1]


def test_index_that_cannot_be_written(store: DiskStore, clock: Time) -> None:
    """A full disk meets SQLite, too: its pages are not acknowledged."""
    ns = store.namespace(NAMESPACE, 100)
    write(ns, range(20))
    db = store._index._db
    (blocks,) = db.execute("PRAGMA page_count").fetchone()
    db.execute(f"PRAGMA max_page_count={blocks}")
    n_written = [write(ns, range(first, first + 50)) for first in range(1000, 2000, 50)]
    assert 0 in n_written
    assert store.stats().degraded
    assert len(ns) == 20 + sum(n_written)
    db.execute("PRAGMA max_page_count=1000000")
    clock.now_s = 100.0
    assert write(ns, [7777]) == 1
    assert not store.stats().degraded


def test_errors_during_reclaim_lose_no_page_silently(
    open_store: OpenStore, io: FaultyIo, clock: Time
) -> None:
    store = open_store(io_ops=io, capacity_bytes=8 * MIB)
    store._gate._now = clock
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    for step in range(200):
        io.write_error = errno.EIO if step % 7 == 0 else None
        io.read_error = errno.EIO if step % 5 == 0 else None
        write(ns, [step, step + 1, step + 2])
        read(ns, [step])
        clock.now_s += 61.0
    io.write_error = io.read_error = None
    present = [seed for seed in range(500) if ns.contains(page_hash(seed))]
    assert readable(ns, present) == present
    assert len(present) == store.stats().pages > 30
    assert store.stats().checksum_failures == 0
