"""Clearing takes no time, whatever the disk does, and what was cleared stays so."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from disk_builders import (
    MIB,
    NAMESPACE,
    PAGE_BYTES,
    page_hash,
    read,
    readable,
    segment_files,
    write,
)

from tiered_kv.tiers.disk import keeper as keeper_module
from tiered_kv.tiers.disk import space as space_module
from tiered_kv.tiers.disk.catalog import Cleared
from tiered_kv.tiers.disk.generation import GENERATION_NAME, read_generation, write_generation
from tiered_kv.tiers.disk.index import PageIndex, index_files
from tiered_kv.tiers.disk.io_ops import IoOps
from tiered_kv.tiers.disk.record import SegmentHeader
from tiered_kv.tiers.disk.store import DiskStore

OpenStore = Callable[..., DiskStore]


def wait_until(is_so: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class Held(IoOps):
    """Calls that write, delete or make files wait while they are held."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.n_waiting = 0

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self._wait()
        return super().pwritev(fd, buffers, offset)

    def allocate(self, fd: int, n_bytes: int) -> None:
        self._wait()
        super().allocate(fd, n_bytes)

    def delete(self, path: Path) -> None:
        self._wait()
        super().delete(path)

    def _wait(self) -> None:
        self.n_waiting += 1
        self.go.wait()
        self.n_waiting -= 1


def test_clearing_waits_for_nothing(open_store: OpenStore, directory: Path) -> None:
    """Not for a write that hangs, nor for the files. That write isn't acknowledged any more."""
    io = Held()
    store = open_store(io_ops=io)
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    write(ns, range(100))
    io.go.clear()
    results: list[int] = []
    late = threading.Thread(target=lambda: results.append(write(ns, range(200, 210))))
    late.start()
    wait_until(lambda: io.n_waiting > 0)
    started = time.perf_counter()
    store.clear()
    stats = store.stats()
    assert len(ns) == stats.pages == stats.segments == 0
    assert not ns.contains(page_hash(1))
    assert ns.count_prefix([page_hash(1)]) == 0
    assert time.perf_counter() - started < 0.1
    assert ns.drain_dropped() is None
    assert stats.bytes_on_disk > 5 * MIB, "the files are still there, and counted"
    io.go.set()
    late.join()
    assert results == [0]
    assert not store.stats().degraded
    assert write(ns, range(10)) == 10
    assert read(ns, range(10)) == 10
    assert readable(ns, range(200, 210)) == []
    store.collect_garbage()
    assert len(segment_files(directory)) == store.stats().segments == 1


def test_clearing_raises_for_no_index(open_store: OpenStore) -> None:
    store = open_store()
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    write(ns, range(20))
    with store._index.lock:
        store._index._db.execute("PRAGMA query_only=ON")
    store.clear()
    assert len(ns) == 0
    with store._index.lock:
        store._index._db.execute("PRAGMA query_only=OFF")


def test_nothing_new_before_the_old_is_known_to_be_over(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as the new generation cannot be noted nothing is acknowledged in it."""
    store = open_store()
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    write(ns, range(20))
    is_broken = True

    def fail(directory: Path, generation: int, *, sync: bool) -> None:
        if is_broken:
            raise OSError(28, os.strerror(28))
        write_generation(directory, generation, sync=sync)

    monkeypatch.setattr(keeper_module, "write_generation", fail)
    store._gate._now = lambda: 0.0
    store.clear()
    assert write(ns, range(5)) == 0
    assert store.stats().degraded
    assert len(ns) == 0
    is_broken = False
    store._gate._now = lambda: 100.0
    assert write(ns, range(5)) == 5
    assert read_generation(store.directory) == 1


CRASH = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from disk_builders import NAMESPACE, PAGE_BYTES, write
from tiered_kv.tiers.disk.io_ops import IoOps
from tiered_kv.tiers.disk.store import DiskStore
class NeverDeletes(IoOps):
    def delete(self, path):
        raise OSError(5, "injected")
store = DiskStore.open(Path(sys.argv[1]), capacity_bytes=1 << 27, io_ops=NeverDeletes())
ns = store.namespace(NAMESPACE, PAGE_BYTES)
assert write(ns, range(100)) == 100
store.clear()
assert write(ns, range(200, 203)) == 3
os.kill(os.getpid(), 9)
"""


@pytest.fixture
def crashed(directory: Path) -> Path:
    """Pages 0 to 99 were cleared, 200 to 202 stored after that; the old files are all there."""
    command = [sys.executable, "-c", CRASH, str(directory), str(Path(__file__).parent)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == -9, run.stderr
    assert len(segment_files(directory)) > 2
    return directory


@pytest.mark.parametrize("index_is_lost", [False, True])
def test_crash_in_the_middle_of_clearing(
    open_store: OpenStore, crashed: Path, index_is_lost: bool
) -> None:
    if index_is_lost:
        (crashed / "index.sqlite").write_bytes(b"nonsense" * 1000)
    store = open_store()
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    assert readable(ns, [*range(100), *range(200, 210)]) == [200, 201, 202]
    store.collect_garbage()
    assert len(segment_files(crashed)) == 1, "what was left is deleted"
    assert read(ns, range(200, 203)) == 3


@pytest.mark.parametrize("contents", [b"", b"1", b"-1\n", b"1x\n", b"\xff\n", b"99999999999\n"])
def test_damaged_generation_serves_nothing(
    open_store: OpenStore, crashed: Path, contents: bytes
) -> None:
    """Nobody knows what was cleared: so everything counts as cleared, and it goes on from there."""
    (crashed / GENERATION_NAME).write_bytes(contents)
    store = open_store()
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    assert len(ns) == 0
    assert write(ns, range(3)) == 3
    store.close()
    store = open_store()
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    assert readable(ns, [*range(10), *range(200, 210)]) == [0, 1, 2]


def test_lost_generation_and_index_serve_nothing(open_store: OpenStore, crashed: Path) -> None:
    """Files of several generations are there, of which any but the last is over."""
    (crashed / GENERATION_NAME).write_bytes(b"")
    for file in index_files(crashed):
        file.unlink(missing_ok=True)
    store = open_store()
    assert len(store.namespace(NAMESPACE, PAGE_BYTES)) == 0
    assert store._catalog.generation == 2


@pytest.mark.parametrize("index_is_lost", [False, True])
def test_a_segment_tells_of_a_clear_that_the_directory_forgot(
    open_store: OpenStore, crashed: Path, index_is_lost: bool
) -> None:
    """As after a power loss that came before the generation was on the device."""
    write_generation(crashed, 0, sync=False)
    if index_is_lost:
        for file in index_files(crashed):
            file.unlink(missing_ok=True)
    store = open_store()
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    assert readable(ns, [*range(100), *range(200, 210)]) == [200, 201, 202]
    store.close()
    assert read_generation(crashed) == 1


def test_no_file_of_a_generation_before_that_is_on_disk(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the next clear comes right behind the saving of the one before."""
    store = open_store()
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    created: list[tuple[int, int | None]] = []
    create = store._files.create

    def note(header: SegmentHeader) -> None:
        created.append((header.generation, read_generation(store.directory)))
        create(header)

    def save_and_clear(directory: Path, generation: int, *, sync: bool) -> None:
        write_generation(directory, generation, sync=sync)
        if generation < 10:
            store.clear()

    monkeypatch.setattr(store._files, "create", note)
    monkeypatch.setattr(keeper_module, "write_generation", save_and_clear)
    store.clear()
    for seed in range(100):
        write(ns, [seed])
    assert created
    assert all(saved is not None and made <= saved for made, saved in created)


def test_a_clear_that_comes_with_the_end_holds(open_store: OpenStore) -> None:
    store = open_store()
    write(store.namespace(NAMESPACE, PAGE_BYTES), range(20))
    store.clear()
    store.close()
    store = open_store()
    assert store.stats().pages == 0
    assert readable(store.namespace(NAMESPACE, PAGE_BYTES), range(20)) == []


def test_clearing_often(open_store: OpenStore, directory: Path) -> None:
    """A hundred weight updates in a row; every one in the middle of something."""
    store = open_store(capacity_bytes=32 * MIB)
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    writing = threading.Event()

    def go_on_writing() -> None:
        first = 1000
        while not writing.is_set():
            write(ns, range(first, first + 7))
            first += 7

    other = threading.Thread(target=go_on_writing)
    other.start()
    slowest = 0.0
    for seed in range(100):
        write(ns, [seed])
        started = time.perf_counter()
        store.clear()
        slowest = max(slowest, time.perf_counter() - started)
        assert not ns.contains(page_hash(seed))
    writing.set()
    other.join()
    assert slowest < 0.5, "some of it is other threads' turn"
    assert not store.stats().degraded
    store.clear()
    store.collect_garbage()
    assert segment_files(directory) == []
    with PageIndexOf(directory, store) as index:
        assert list(index.runs()) == []
        assert index.segments() == []
        assert index.namespaces() == []


class PageIndexOf:
    """The index that the closed store has left behind."""

    def __init__(self, directory: Path, store: DiskStore) -> None:
        store.close()
        self._index = PageIndex(directory, wal_blocks=100, sync_commits=False)

    def __enter__(self) -> PageIndex:
        return self._index

    def __exit__(self, *exc_info: object) -> None:
        self._index.close()


def test_memory_of_a_cleared_store_is_given_back_in_small_steps(
    open_store: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tables of ten million pages at once would hold every thread up for a fifth of a
    second."""
    monkeypatch.setattr(space_module, "_PIECES_PER_STEP", 5)
    store = open_store(capacity_bytes=16 * MIB)
    write(store.namespace(NAMESPACE, PAGE_BYTES), range(150))
    space = store._space
    seen: list[Cleared] = []
    dispose = space.dispose
    n_steps = 0

    def counted() -> bool:
        nonlocal n_steps
        did = dispose()
        n_steps += did
        if space._disposing is not None:
            seen.append(space._disposing)
        return did

    store._keeper._jobs = [
        type(job)(counted) if job.run == dispose else job for job in store._keeper._jobs
    ]
    store.clear()
    wait_until(lambda: n_steps > 10 and space._disposing is None)
    assert len({id(cleared) for cleared in seen}) == 1
    assert not seen[0].loose
    assert not seen[0].board._blocks
    assert not seen[0].table._shards
