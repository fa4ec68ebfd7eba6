"""Processes that write pages as fast as they can, say which were acknowledged, and are killed.

Usage: disk_writer.py

A process that has imported everything (the zygote) reads one order a line, as JSON, forks, and the
child writes to the store that the order names until it is killed: so a round costs no start of
Python. The child prints `ready` once the store is open, and then, as it happens:

    w DONE BEGUN SEED ...   these pages were acknowledged in one call, which began after DONE clears
                            were over, and ended before more than BEGUN had begun
    b BEGUN                 the clear of this number is about to begin

Three threads write, one reads, one clears (if the order says so); the sizes of batches are drawn at
random, and so are the moments at which it kills itself, if the order says so: before or after any
system call of the store or any commit of its index, wherever that is: in a write, in a reclaim, in
what follows a clear. A thread kills from outside at a random time as well: the zygote.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tiered_kv.tiers.disk import encryption, index_upkeep, keeper
from tiered_kv.tiers.disk.index import PageIndex
from tiered_kv.tiers.disk.io_ops import IoOps
from tiered_kv.tiers.disk.io_path import IoMode, Reuse
from tiered_kv.tiers.disk.namespace import DiskNamespace
from tiered_kv.tiers.disk.store import DiskStore

NAMESPACE = hashlib.sha256(b"fault test").digest()
SEEDS_PER_ROUND = 1 << 20
THREADS = 3
BATCH_PAGES = 12


def page_hash(seed: int) -> bytes:
    return hashlib.sha256(b"page %d" % seed).digest()


def page_payload(seed: int, n_bytes: int) -> bytes:
    """Different in every block, so that a mix of two pages shows."""
    return random.Random(seed).randbytes(n_bytes)


class Fate:
    """Kills the process at the n-th call of `step`, before or after what is done in it."""

    def __init__(self, n_steps: int | None) -> None:
        self._left = n_steps
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Two steps: one before, one after."""
        self._count()
        yield
        self._count()

    def _count(self) -> None:
        if self._left is None:
            return
        with self._lock:
            self._left -= 1
            if self._left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)


class FatefulIo(IoOps):
    """Every system call may be the last."""

    def __init__(self, fate: Fate) -> None:
        self._fate = fate

    def open(self, path: Path, flags: int) -> int:
        with self._fate.step():
            return super().open(path, flags)

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        with self._fate.step():
            return super().preadv(fd, buffers, offset)

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        with self._fate.step():
            return super().pwritev(fd, buffers, offset)

    def allocate(self, fd: int, n_bytes: int) -> None:
        with self._fate.step():
            super().allocate(fd, n_bytes)

    def delete(self, path: Path) -> None:
        with self._fate.step():
            super().delete(path)


def make_commits_fateful(fate: Fate) -> None:
    """Likewise what the index and the generation file do."""
    transaction = PageIndex.transaction

    @contextlib.contextmanager
    def fateful(index: PageIndex) -> Iterator[Any]:
        with fate.step(), transaction(index) as db:
            yield db

    PageIndex.transaction = fateful  # type: ignore[method-assign]
    write_generation = keeper.write_generation

    def fateful_generation(directory: Path, generation: int, *, sync: bool) -> None:
        with fate.step():
            write_generation(directory, generation, sync=sync)

    keeper.write_generation = fateful_generation


def say(line: str) -> None:
    """In one call, so that lines of several threads don't mix."""
    os.write(1, (line + "\n").encode())


class Clears:
    """How many there were."""

    begun = 0
    done = 0


def write_for_ever(ns: DiskNamespace, seed: int) -> None:
    buffers = [memoryview(mmap.mmap(-1, ns.slot_bytes)) for _ in range(BATCH_PAGES)]
    choose = random.Random(seed)
    while True:
        seeds = [seed + THREADS * i for i in range(choose.randint(1, BATCH_PAGES))]
        seed += THREADS * len(seeds)
        for buffer, each in zip(buffers, seeds, strict=False):
            buffer[: ns.page_bytes] = page_payload(each, ns.page_bytes)
        # In mode "auto" the hint decides: pages written by one path are written over by the other.
        reuse = choose.choice(list(Reuse))
        done = Clears.done
        n_written = ns.write_pages([page_hash(s) for s in seeds], buffers[: len(seeds)], reuse)
        if n_written == len(seeds):
            say(" ".join(map(str, ("w", done, Clears.begun, *seeds))))


def read_for_ever(ns: DiskNamespace, first_seed: int) -> None:
    """Gives some pages their second chance, so that reclaim has something to move."""
    buffer = memoryview(mmap.mmap(-1, ns.slot_bytes))
    choose = random.Random(first_seed)
    seed = first_seed
    while True:
        seed = seed + 1 if ns.contains(page_hash(seed + 1)) else first_seed
        if choose.random() < 0.3:
            ns.read_pages([page_hash(seed)], [buffer])
        else:
            time.sleep(0.0005)


def clear_for_ever(store: DiskStore, first_seed: int) -> None:
    choose = random.Random(first_seed)
    while True:
        time.sleep(choose.uniform(0.0, 0.1))
        Clears.begun += 1
        say(f"b {Clears.begun}")
        store.clear()
        Clears.done += 1


def live(order: dict[str, Any]) -> None:
    """What a child does until it is killed."""
    fate = Fate(order["n_steps"])
    make_commits_fateful(fate)
    index_upkeep.SAVE_S = 0.02
    store = DiskStore.open(
        Path(order["directory"]),
        capacity_bytes=order["capacity_bytes"],
        io_mode=IoMode(order["path"]),
        io_ops=FatefulIo(fate),
        key=bytes.fromhex(order["key"]) if order["key"] else None,
    )
    ns = store.namespace(NAMESPACE, order["page_bytes"])
    say("ready")
    first_seed = order["first_seed"]
    jobs: list[Callable[[], None]] = [
        lambda seed=first_seed + n: write_for_ever(ns, seed)  # type: ignore[misc]
        for n in range(THREADS)
    ]
    jobs.append(lambda: read_for_ever(ns, first_seed))
    if order["clears"]:
        jobs.append(lambda: clear_for_ever(store, first_seed))
    threads = [threading.Thread(target=job, daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def serve() -> None:
    """One child for each line; its output, then `end` with how it ended."""
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                live(order)
            finally:
                os._exit(1)
        killer = threading.Timer(order["lives_s"], os.kill, (child, signal.SIGKILL))
        killer.start()
        _, status = os.waitpid(child, 0)
        killer.cancel()
        killer.join()
        # What the kill cut off ends here, too.
        say(f"\nend {status}")


if __name__ == "__main__":
    assert encryption.KEY_BYTES == 32, "imported here, so that no child has to"
    serve()
