"""A disk that hangs, is full, breaks and loses its directory, by turns and under load: it heals.

Pauses and hangs are a tenth of real ones and less. Guaranteed: however long and in whatever order
things went wrong, once they don't any more pages are stored and found again within the longest
pause between two tries; no thread and no descriptor is left when the tier is closed.

There are 6 episodes; TIERED_KV_HEAL_EPISODES=200 are an hour's worth of a real disk's trouble.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
import random
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tiered_kv.tiers import gate
from tiered_kv.tiers.disk import keeper, namespace, stall_watch
from tiered_kv.tiers.disk import tier as tier_module
from tiered_kv.tiers.disk.index import PageIndex
from tiered_kv.tiers.disk.io_ops import IoOps
from tiered_kv.tiers.disk.shards import ShardOpener
from tiered_kv.tiers.disk.store import Access, DiskStore
from tiered_kv.tiers.disk.tier import DiskTier, TierNamespace

EPISODES = int(os.environ.get("TIERED_KV_HEAL_EPISODES", "6"))
MIB = 1 << 20
CAPACITY = 16 * MIB
PAGE_BYTES = 16 << 10
STALL_S, STALL_AFTER_S = 0.5, 0.2
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 2.0
#: What a machine that is busy with other things takes for a try.
PATIENCE_S = 8.0
WRITERS, READERS = 6, 2
FAULTS = ("none", "none", "stall", "full", "broken", "unreadable", "index full", "many files")
ERRORS = {
    "full": errno.ENOSPC,
    "broken": errno.EIO,
    "many files": errno.EMFILE,
    "unreadable": errno.EIO,
}


class Disk(IoOps):
    """Does what `fault` says."""

    fault = "none"

    def _fail(self, *faults: str) -> None:
        if self.fault == "stall":
            time.sleep(STALL_S)
        elif self.fault in faults:
            code = ERRORS[self.fault]
            raise OSError(code, os.strerror(code))

    def open(self, path: Path, flags: int) -> int:
        self._fail("many files")
        return super().open(path, flags)

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self._fail("unreadable")
        return super().preadv(fd, buffers, offset)

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self._fail("broken", "full")
        return super().pwritev(fd, buffers, offset)

    def allocate(self, fd: int, n_bytes: int) -> None:
        self._fail("full")
        super().allocate(fd, n_bytes)

    def delete(self, path: Path) -> None:
        self._fail("broken")
        super().delete(path)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()
    for module in (gate, keeper, tier_module):
        monkeypatch.setattr(module, "FIRST_PAUSE_S", FIRST_PAUSE_S)
        monkeypatch.setattr(module, "LONGEST_PAUSE_S", LONGEST_PAUSE_S)
    monkeypatch.setattr(stall_watch, "STALL_AFTER_S", STALL_AFTER_S)
    monkeypatch.setattr(namespace, "_LOOK_S", 0.05)
    monkeypatch.setattr(tier_module, "LOOK_S", 0.2)
    transaction = PageIndex.transaction

    @contextlib.contextmanager
    def failing(index: PageIndex) -> Iterator[sqlite3.Connection]:
        if disk.fault == "index full":
            error = sqlite3.OperationalError("injected")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error
        with transaction(index) as db:
            yield db

    monkeypatch.setattr(PageIndex, "transaction", failing)
    return disk


def page_hash(seed: int) -> bytes:
    return hashlib.sha256(b"page %d" % seed).digest()


def page_payload(seed: int) -> bytes:
    return random.Random(seed).randbytes(PAGE_BYTES)


class Pages:
    """The pages of the weights that are in use, which change now and then."""

    def __init__(self, tier: DiskTier) -> None:
        self._tier = tier
        self.change(0)

    def change(self, number: int) -> None:
        self.ns = self._tier.namespace(hashlib.sha256(b"weights %d" % number).digest(), PAGE_BYTES)


def write(ns: TierNamespace, seeds: Sequence[int]) -> int:
    buffers = [memoryview(mmap.mmap(-1, PAGE_BYTES)) for _ in seeds]
    for seed, buffer in zip(seeds, buffers, strict=True):
        buffer[:] = page_payload(seed)
    return ns.write_pages([page_hash(seed) for seed in seeds], buffers)


def read(ns: TierNamespace, seeds: Sequence[int]) -> int:
    buffers = [memoryview(mmap.mmap(-1, PAGE_BYTES)) for _ in seeds]
    n_read = ns.read_pages([page_hash(seed) for seed in seeds], buffers)
    for seed, buffer in zip(seeds[:n_read], buffers, strict=False):
        assert buffer == page_payload(seed)
    return n_read


class Load:
    """Threads that write and read all the time."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self._is_over = False
        self.errors: list[BaseException] = []
        jobs = [(self._write, n) for n in range(WRITERS)] + [
            (self._read, n) for n in range(READERS)
        ]
        self._threads = [threading.Thread(target=self._run, args=job) for job in jobs]
        for thread in self._threads:
            thread.start()

    def _run(self, act: Callable[[random.Random], int], number: int) -> None:
        choose = random.Random(f"{act.__name__} {number}")
        try:
            while not self._is_over:
                if not act(choose):
                    time.sleep(0.01)
        except BaseException as error:
            self.errors.append(error)

    def _write(self, choose: random.Random) -> int:
        first = choose.randrange(5_000)
        return write(self._pages.ns, range(first, first + choose.randint(1, 12)))

    def _read(self, choose: random.Random) -> int:
        first = choose.randrange(5_000)
        return read(self._pages.ns, range(first, first + 4))

    def end(self) -> None:
        self._is_over = True
        for thread in self._threads:
            thread.join()
        assert not self.errors, self.errors


def trouble(disk: Disk, tier: DiskTier, pages: Pages, choose: random.Random, path: Path) -> None:
    """For some seconds."""
    for _ in range(choose.randint(2, 8)):
        disk.fault = choose.choice(FAULTS)
        what = choose.random()
        if what < 0.15:
            tier.clear()
        elif what < 0.4:
            pages.change(choose.randrange(1000))
        elif what < 0.45:
            shutil.rmtree(path, ignore_errors=True)
        time.sleep(choose.choice((0.05, 0.3, 1.0)))
    disk.fault = "none"


def seconds_to_heal(tier: DiskTier, ns: TierNamespace, seed: int) -> float:
    """Until a page that was never written before is stored, found and read."""
    began = time.monotonic()
    while True:
        seed += 1
        if write(ns, [seed]) and ns.contains(page_hash(seed)) and read(ns, [seed]):
            return time.monotonic() - began
        took = time.monotonic() - began
        assert took < LONGEST_PAUSE_S + PATIENCE_S, f"not after {took:.0f} s: {tier.stats()}"
        time.sleep(0.05)


def n_open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.mark.slow
@pytest.mark.timeout(60 + 20 * EPISODES)
def test_it_heals_whatever_went_wrong(tmp_path: Path, disk: Disk) -> None:
    n_threads, n_files = threading.active_count(), n_open_files()

    def open_store(path: Path, access: Access) -> DiskStore:
        return DiskStore.open(path, capacity_bytes=CAPACITY, io_ops=disk, access=access)

    opener = ShardOpener(tmp_path / "disk", 0, 1, "a server", open_store)
    tier = DiskTier.open(opener, str(opener.path), CAPACITY, PATIENCE_S)
    choose = random.Random(1)
    pages = Pages(tier)
    took = []
    for episode in range(EPISODES):
        load = Load(pages)
        trouble(disk, tier, pages, choose, opener.path)
        # Half of the time with the load still there.
        if is_quiet := choose.random() < 0.5:
            load.end()
        took.append(seconds_to_heal(tier, pages.ns, 1_000_000 * (episode + 1)))
        if not is_quiet:
            load.end()
    print(f"healed {EPISODES} times, after {max(took):.1f} s at the longest")
    tier.close(PATIENCE_S)
    assert threading.active_count() == n_threads, [t.name for t in threading.enumerate()]
    assert n_open_files() <= n_files
