"""Many threads: readers against reclaim of the very slots they read, writers of the same pages."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from disk_builders import MIB, NAMESPACE, aligned, filled, page_hash, page_payload, read, write

from tiered_kv.tiers.disk.io_ops import IoOps
from tiered_kv.tiers.disk.io_path import IoMode
from tiered_kv.tiers.disk.store import DiskStore

OpenStore = Callable[..., DiskStore]
PAGE_BYTES = 20_000


def run_threads(jobs: Sequence[Callable[[], None]]) -> None:
    """Run all at once; the first failure of any is raised here."""
    failures: list[BaseException] = []

    def guarded(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_readers_and_writers_while_segments_are_reused(
    open_store: OpenStore, io_mode: IoMode
) -> None:
    """Every page that a read returns is the right one, though slots change owners all the time."""
    store = open_store(capacity_bytes=6 * MIB, io_mode=io_mode)
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    universe = 1200
    payloads = [page_payload(seed, PAGE_BYTES) for seed in range(universe)]
    began = time.monotonic()
    n_read = [0]

    def goes_on() -> bool:
        """For three seconds, longer where the disk is slow: how much is reused depends on it."""
        took_s = time.monotonic() - began
        return took_s < 3.0 or (took_s < 60.0 and store.stats().reclaimed_segments <= 5)

    def write_some(worker: int) -> None:
        choose = random.Random(worker)
        buffers = [aligned(PAGE_BYTES) for _ in range(16)]
        while goes_on():
            seeds = choose.sample(range(universe), choose.randint(1, 16))
            for seed, buffer in zip(seeds, buffers, strict=False):
                buffer[:] = payloads[seed]
            ns.write_pages([page_hash(seed) for seed in seeds], buffers[: len(seeds)])

    def read_some(worker: int) -> None:
        choose = random.Random(100 + worker)
        buffers = [aligned(PAGE_BYTES) for _ in range(16)]
        while goes_on():
            first = choose.randrange(universe)
            seeds = [(first + i) % universe for i in range(16)]
            seeds = [seed for seed in seeds if ns.contains(page_hash(seed))]
            n = ns.read_pages([page_hash(seed) for seed in seeds], buffers[: len(seeds)])
            for seed, buffer in zip(seeds[:n], buffers, strict=False):
                assert buffer == payloads[seed], f"page {seed} differs"
            n_read[0] += n

    run_threads(
        [lambda w=w: write_some(w) for w in range(3)] + [lambda w=w: read_some(w) for w in range(3)]
    )
    stats = store.stats()
    assert stats.reclaimed_segments > 5
    assert n_read[0] > 100
    assert stats.checksum_failures == stats.io_errors == 0
    assert not stats.degraded
    stored = [seed for seed in range(universe) if ns.contains(page_hash(seed))]
    assert len(stored) == stats.pages == len(ns)
    for seed in stored:
        assert read(ns, [seed]) == 1


class SlowReads(IoOps):
    """Reads that wait, between being planned and being done, until they are let go."""

    def __init__(self) -> None:
        self.hold = threading.Event()
        self.hold.set()
        self.entered = threading.Event()

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self.entered.set()
        self.hold.wait()
        return super().preadv(fd, buffers, offset)


def test_read_that_lost_its_slot_is_a_miss(open_store: OpenStore, io_mode: IoMode) -> None:
    """The slot is given to another page after the read was planned and before it is done."""
    io = SlowReads()
    store = open_store(capacity_bytes=4 * MIB, io_mode=io_mode, io_ops=io)
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    write(ns, range(5))
    io.hold.clear()
    results: list[int] = []
    reader = threading.Thread(target=lambda: results.append(read(ns, range(5))))
    reader.start()
    io.entered.wait()
    # The pages being read have just been touched; only pages read later can push them out.
    with store._catalog.lock:
        for segment in store._catalog.segments.values():
            for slot in range(5):
                segment.access[slot] &= ~np.uint64(1)
    for first in range(100, 600, 10):
        write(ns, range(first, first + 10))
    assert not ns.contains(page_hash(0))
    io.hold.set()
    reader.join()
    assert results == [0]
    assert store.stats().checksum_failures == 0, "a lost race is no damage"


def test_read_follows_a_page_that_was_moved(open_store: OpenStore, io_mode: IoMode) -> None:
    io = SlowReads()
    store = open_store(capacity_bytes=4 * MIB, io_mode=io_mode, io_ops=io)
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    write(ns, range(20))
    results: list[int] = []
    io.entered.clear()
    io.hold.clear()
    reader = threading.Thread(target=lambda: results.append(read(ns, [3])))
    reader.start()
    io.entered.wait()
    # Reclaim itself reads: let only the first reader wait.
    held, io.hold = io.hold, threading.Event()
    io.hold.set()
    for first in range(100, 2000, 10):
        write(ns, range(first, first + 10))
        if first < 1000:
            with store._catalog.lock:
                store._catalog.locate(ns._entries, page_hash(3))[0].touch(  # type: ignore[index]
                    store._catalog.locate(ns._entries, page_hash(3))[1],  # type: ignore[index]
                    store._catalog.tick(),
                )
        elif store.stats().moved_pages:
            break
    assert store.stats().moved_pages
    assert ns.contains(page_hash(3))
    held.set()
    reader.join()
    assert results == [1]


def test_writers_of_the_same_pages_write_them_once(open_store: OpenStore) -> None:
    store = open_store()
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    hashes = [page_hash(seed) for seed in range(100)]
    buffers = [filled(seed, PAGE_BYTES) for seed in range(100)]
    acknowledged: list[int] = []

    def write_all(worker: int) -> None:
        order = list(range(100))
        random.Random(worker).shuffle(order)
        n = 0
        for start in range(0, 100, 10):
            chunk = order[start : start + 10]
            n += ns.write_pages([hashes[i] for i in chunk], [buffers[i] for i in chunk])
            # Whoever wrote them: on return they are stored.
            assert all(ns.contains(hashes[i]) for i in chunk)
        acknowledged.append(n)

    run_threads([lambda w=w: write_all(w) for w in range(6)])
    assert sum(acknowledged) == 100
    assert store.stats().pages == store.stats().writes == 100
    assert read(ns, range(100)) == 100


def test_clear_while_pages_are_written_and_read(open_store: OpenStore) -> None:
    store = open_store(capacity_bytes=8 * MIB)
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    deadline = time.monotonic() + 2.0

    def write_some() -> None:
        seed = 0
        while time.monotonic() < deadline:
            write(ns, range(seed, seed + 8))
            seed += 8

    def read_some() -> None:
        choose = random.Random(1)
        while time.monotonic() < deadline:
            read(ns, [choose.randrange(500)])

    def clear_some() -> None:
        while time.monotonic() < deadline:
            time.sleep(0.05)
            store.clear()

    run_threads([write_some, read_some, read_some, clear_some])
    store.clear()
    assert store.stats().pages == len(ns) == 0
    assert write(ns, [1]) == 1
    store.close()
    reopened = open_store(capacity_bytes=8 * MIB).namespace(NAMESPACE, PAGE_BYTES)
    assert len(reopened) == 1
    assert read(reopened, [1]) == 1


def test_threads_and_descriptors_are_given_back(open_store: OpenStore, directory: object) -> None:
    descriptors = Path("/proc/self/fd")
    open_store().close()
    n_threads, n_fds = threading.active_count(), len(list(descriptors.iterdir()))
    for first in range(0, 50, 10):
        store = open_store(capacity_bytes=8 * MIB)
        ns = store.namespace(NAMESPACE, PAGE_BYTES)
        write(ns, range(first, first + 150))
        read(ns, range(first, first + 10))
        store.clear()
        write(ns, range(first, first + 150))
        store.close()
    assert threading.active_count() == n_threads
    assert len(list(descriptors.iterdir())) == n_fds
