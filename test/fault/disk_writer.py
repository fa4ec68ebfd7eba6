"""Processes that write pages as fast as they can, say which were acknowledged, and are killed.

Usage: disk_writer.py

A process that has imported everything (the zygote) reads one order a line, as JSON, forks, and the
child writes to the store that the order names until it is killed: so a round costs no start of
Python. The child prints `ready` once the store is open, and then, as it happens:

    w DONE BEGUN SEED ...   these pages were acknowledged in one call, which began after DONE clears
                            were over, and ended before more than BEGUN had begun
    b BEGUN                 the clear of this number is about to begin
    k NAME ...              pages that can be read now (the first 8 bytes of their names)
    x PLACE                 it kills itself now, in this place; in the middle of a reclaim, which is
                            what gives pages up, after it has said which can be read

Three threads write, pages of two sizes, in batches and after pauses of random length; one reads,
one clears and one closes the store (if the order says so). A child either kills itself, with
SIGKILL, before or after some system call of the store or some step of its index, of all of them or
of those in one place (see `PLACES`), or in the middle of a write; or the zygote kills it from
outside, at any instant.
"""

from __future__ import annotations

import contextlib
import functools
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
from types import CodeType, FrameType
from typing import Any

from tiered_kv.tiers.disk import encryption, index_upkeep, keeper, page_mover
from tiered_kv.tiers.disk.index import PageIndex
from tiered_kv.tiers.disk.io_ops import IoOps
from tiered_kv.tiers.disk.io_path import IoMode, Reuse
from tiered_kv.tiers.disk.namespace import DiskNamespace
from tiered_kv.tiers.disk.record import BLOCK_BYTES
from tiered_kv.tiers.disk.store import DiskStore

THREADS = 3
SEEDS_PER_ROUND = THREADS << 18
"""A multiple of the threads, so that a seed tells which of them writes the page."""
BATCH_PAGES = 24
SAVE_S = 0.02
"""Upkeep once a minute would hardly ever be met."""
TEAR = "tear"
"""A place: within a write of pages, so that only some of its blocks are there."""
CARRY = "carry over"
"""A place: likewise, but of pages that reclaim carries over."""
NAME_BYTES = 8

UPKEEP = ("refill", "pack", "save_order_of_use", "forget_namespaces", "give_back", "compact")
PLACES = {
    "rebuild": ("_rebuild",),
    "start": ("_start_keeper", "__init__"),
    "close": ("_finish",),
    "clear": ("save_generation",),
    "new segment": ("_create",),
    "delete": ("delete_condemned",),
    "reclaim": ("_reclaim", "shrink"),
    "upkeep": UPKEEP,
    "commit": ("_acknowledge",),
    "write": ("write_run",),
    "read": ("read_run",),
}
"""What is under way, by the functions of the store that do it; the first that fits counts."""


def namespace_of(seed: int) -> bytes:
    return hashlib.sha256(b"fault test %d" % (seed % THREADS == 0)).digest()


def size_of(seed: int, page_bytes: int) -> int:
    """A third of the pages is smaller, so that segments of two kinds compete for the budget."""
    return page_bytes if seed % THREADS else page_bytes // 3


def page_hash(seed: int) -> bytes:
    return hashlib.sha256(b"page %d" % seed).digest()


def page_payload(seed: int, page_bytes: int) -> bytes:
    """Different in every block, so that a mix of two pages shows."""
    return random.Random(seed).randbytes(size_of(seed, page_bytes))


class Fate:
    """Kills the process at the n-th step in a place (anywhere if there is none)."""

    def __init__(self, n_steps: int | None, place: str | None) -> None:
        self._left = n_steps
        self._place = place
        self._lock = threading.Lock()
        self.store: DiskStore | None = None
        """Once it is open."""

    def strike(self, place: str) -> None:
        self._place, self._left = "over", None
        with SAYING:
            if self.store is not None and place in ("reclaim", CARRY):
                # The keeper is here, or waits for us: nothing is given up from now on.
                names = readable_pages(self.store)
                write_line(" ".join(("k", *(name[:NAME_BYTES].hex() for name in names))))
            write_line(f"x {place}")
            os.kill(os.getpid(), signal.SIGKILL)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Two steps: one before, one after."""
        if self._left is None:
            yield
            return
        place = place_of_caller()
        self._count(place)
        yield
        self._count(place)

    def tears(self) -> str | None:
        """Where we are, if this is the write that a kill cuts off."""
        is_place = self._place == TEAR or (self._place == CARRY and is_carried_over())
        return self._place if is_place and self._is_due() else None

    def _count(self, place: str) -> None:
        if self._place in (None, place) and self._is_due():
            self.strike(place)

    def _is_due(self) -> bool:
        with self._lock:
            if self._left is None:
                return False
            self._left -= 1
            return self._left <= 0


def readable_pages(store: DiskStore) -> list[bytes]:
    """An earlier rebuild may have found what a kill had cut off, and nobody has read it since."""
    names = []
    for ns in store.namespaces():
        buffer = memoryview(mmap.mmap(-1, ns.slot_bytes))
        names += [name for name in ns.hashes() if ns.check_pages([name], [buffer])[0]]
    return names


def callers() -> Iterator[CodeType]:
    """The functions of the store that are under way in this thread."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if "tiers/disk" in frame.f_code.co_filename:
            yield frame.f_code
        frame = frame.f_back


def is_carried_over() -> bool:
    """Is what is written a page that reclaim moves? Also on a thread that does I/O for it."""
    return any(code.co_filename == page_mover.__file__ for code in callers())


def place_of_caller() -> str:
    names = {code.co_name for code in callers()}
    return next((place for place, those in PLACES.items() if names & {*those}), "other")


def some_of(buffers: Sequence[memoryview]) -> list[memoryview]:
    """The first blocks, as they are in the file when a kill cuts a write off."""
    left = random.randrange(1, max(sum(map(len, buffers)) // BLOCK_BYTES, 2)) * BLOCK_BYTES
    some = []
    for buffer in buffers:
        some.append(buffer[:left])
        left -= len(some[-1])
        if not left:
            break
    return some


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
            if place := self._fate.tears():
                super().pwritev(fd, some_of(buffers), offset)
                self._fate.strike(place)
            return super().pwritev(fd, buffers, offset)

    def allocate(self, fd: int, n_bytes: int) -> None:
        with self._fate.step():
            super().allocate(fd, n_bytes)

    def delete(self, path: Path) -> None:
        with self._fate.step():
            super().delete(path)


def make_index_fateful(fate: Fate) -> None:
    """Likewise what the index and the generation file do."""
    transaction = PageIndex.transaction

    @contextlib.contextmanager
    def fateful(index: PageIndex) -> Iterator[Any]:
        with fate.step(), transaction(index) as db:
            yield db
            with fate.step():  # Before what was written is committed.
                pass

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with fate.step():
                return function(*args, **kwargs)

        return wrapped

    PageIndex.transaction = fateful  # type: ignore[method-assign]
    for name in ("_connect", "give_back", "fold_log", "close"):
        setattr(PageIndex, name, wrap(getattr(PageIndex, name)))
    keeper.write_generation = wrap(keeper.write_generation)


SAYING = threading.Lock()


def say(line: str) -> None:
    with SAYING:
        write_line(line)


def write_line(line: str) -> None:
    os.write(1, (line + "\n").encode())


class Clears:
    """How many there were."""

    begun = 0
    done = 0


def write_for_ever(ns: DiskNamespace, seed: int, page_bytes: int) -> None:
    buffers = [memoryview(mmap.mmap(-1, ns.slot_bytes)) for _ in range(BATCH_PAGES)]
    choose = random.Random(seed)
    while True:
        if choose.random() < 0.3:
            time.sleep(choose.expovariate(200))
        seeds = [seed + THREADS * i for i in range(int(BATCH_PAGES ** choose.random()))]
        seed += THREADS * len(seeds)
        for buffer, each in zip(buffers, seeds, strict=False):
            buffer[: ns.page_bytes] = page_payload(each, page_bytes)
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
        seed = seed + THREADS if ns.contains(page_hash(seed + THREADS)) else first_seed
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
    fate = Fate(order["n_steps"], order["place"])
    make_index_fateful(fate)
    index_upkeep.SAVE_S = SAVE_S
    store = DiskStore.open(
        Path(order["directory"]),
        capacity_bytes=order["capacity_bytes"],
        io_mode=IoMode(order["path"]),
        io_ops=FatefulIo(fate),
        key=bytes.fromhex(order["key"]) if order["key"] else None,
    )
    fate.store = store
    first_seed, page_bytes = order["first_seed"], order["page_bytes"]
    namespaces = [
        store.namespace(namespace_of(seed), size_of(seed, page_bytes))
        for seed in range(first_seed, first_seed + THREADS)
    ]
    say("ready")
    jobs: list[Callable[[], None]] = [
        functools.partial(write_for_ever, ns, first_seed + n, page_bytes)
        for n, ns in enumerate(namespaces)
    ]
    jobs.append(lambda: read_for_ever(namespaces[1], first_seed + 1))
    if order["clears"]:
        jobs.append(lambda: clear_for_ever(store, first_seed))
    for job in jobs:
        threading.Thread(target=job, daemon=True).start()
    if order["closes_after_s"] is None:
        threading.Event().wait()
    time.sleep(order["closes_after_s"])
    store.close()
    fate.strike("closed")


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
