"""The throughput part of `disk.py`: the store and the raw disk take turns, slice by slice.

A disk shared with others (or throttled by a cloud) changes its speed from second to second. So in
each round every system moves one slice (64 MiB, say), in an order that rotates; systems are
compared within each round, and the median over the rounds is shown.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tiered_kv.core.units import MIB
from tiered_kv.tiers.disk.io_path import IoMode
from tiered_kv.tiers.disk.store import DiskStore

NAMESPACE = hashlib.sha256(b"benchmark").digest()
STORE_BYTES = 8 << 30  # segments of half a GiB, as a real store has; only those in use exist
REUSE_BYTES = 2 << 30  # a full store; large enough for segments that take a whole slice
KEY = hashlib.sha256(b"benchmark key").digest()

FRESH, REWRITTEN = "fresh", "rewritten"


@dataclass(frozen=True)
class Shape:
    """What is measured: pages of `page_bytes`, `slice_bytes` at a time, on so many threads."""

    page_bytes: int
    slice_bytes: int
    slices: int
    threads: int

    @property
    def pages_per_slice(self) -> int:
        return max(self.slice_bytes // self.page_bytes, 1)


@dataclass(frozen=True)
class Row:
    """One system at one shape; medians over the slices."""

    page_mib: float
    threads: int
    system: str
    blocks: str
    """fresh: preallocated, never written; rewritten: written before, as in a store that is full."""
    write_gb_s: float | None
    read_gb_s: float | None
    write_cpu_s_per_gb: float | None
    read_cpu_s_per_gb: float | None
    write_ratio_to_raw: float | None
    """To the faster raw I/O size on the same kind of blocks; the median of the rounds."""
    read_ratio_to_raw: float | None


class System:
    """Something that stores slices; `write` and `read` return when the device has the bytes."""

    name: str
    blocks = FRESH
    is_raw = False
    can_write = True

    def write(self, index: int) -> None:
        raise NotImplementedError

    def read(self, index: int) -> None:
        raise NotImplementedError

    def settle(self) -> None:
        """Flush what the device and the file system still hold back; not timed."""
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


class Raw(System):
    """Nothing but pwritev and preadv with O_DIRECT on a preallocated file."""

    is_raw = True

    def __init__(
        self, directory: Path, shape: Shape, memory: memoryview, io_bytes: int, blocks: str
    ) -> None:
        self.name, self.blocks = f"raw {io_bytes // MIB} MiB", blocks
        self._shape, self._memory, self._io_bytes = shape, memory, io_bytes
        self._path = directory / f"raw-{io_bytes}-{blocks}"
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        os.posix_fallocate(self._fd, 0, shape.slices * len(memory))
        if blocks == REWRITTEN:
            for index in range(shape.slices):
                self.write(index)
            self.settle()

    def write(self, index: int) -> None:
        self._spread(index, os.pwritev)

    def settle(self) -> None:
        os.fdatasync(self._fd)

    def read(self, index: int) -> None:
        self._spread(index, os.preadv)

    def _spread(self, index: int, call: Callable[[int, list[memoryview], int], int]) -> None:
        """Each thread takes every n-th I/O."""
        size, base = self._io_bytes, index * len(self._memory)

        def work(worker: int) -> None:
            for at in range(worker * size, len(self._memory), self._shape.threads * size):
                call(self._fd, [self._memory[at : at + size]], base + at)

        workers = [threading.Thread(target=work, args=(n,)) for n in range(self._shape.threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    def close(self) -> None:
        os.close(self._fd)
        self._path.unlink()


class Store(System):
    """The disk tier. `blocks` REWRITTEN: its budget is small, and used up before the clock runs."""

    def __init__(
        self,
        directory: Path,
        shape: Shape,
        memory: memoryview,
        mode: IoMode,
        *,
        blocks: str = FRESH,
        key: bytes | None = None,
    ) -> None:
        self.name, self.blocks = mode.value, blocks
        if key is not None:
            self.name += ", encrypted"
        self._mode = mode
        size = shape.page_bytes
        self._pages = [memory[i * size : (i + 1) * size] for i in range(shape.pages_per_slice)]
        capacity = STORE_BYTES
        if blocks == REWRITTEN:
            capacity = REUSE_BYTES
        self._directory = directory / self.name.replace(", ", "-") / blocks
        self._store = DiskStore.open(
            self._directory,
            capacity_bytes=capacity,
            io_threads=shape.threads,
            io_mode=mode,
            key=key,
        )
        self._namespace = self._store.namespace(NAMESPACE, size)
        self._fds: dict[Path, int] = {}
        self._synced_ns: dict[Path, int] = {}
        if blocks == REWRITTEN:
            for index in range(REUSE_BYTES // len(memory) + 4):
                self.write(-1 - index)

    def _hashes(self, index: int) -> list[bytes]:
        return [
            hashlib.sha256(b"%d %d" % (index, page)).digest() for page in range(len(self._pages))
        ]

    def write(self, index: int) -> None:
        if self._namespace.write_pages(self._hashes(index), self._pages) != len(self._pages):
            raise RuntimeError("a write failed")
        if self._mode is IoMode.BUFFERED:
            self.settle()

    def read(self, index: int) -> None:
        if self._namespace.read_pages(self._hashes(index), self._pages) != len(self._pages):
            raise RuntimeError("a read failed")

    def settle(self) -> None:
        for path in (self._directory / "segments").iterdir():
            if path not in self._fds:
                self._fds[path] = os.open(path, os.O_RDONLY)
            changed_ns = os.fstat(self._fds[path]).st_mtime_ns
            # Each fdatasync flushes the device's cache, even for a file that has nothing to flush.
            if self._synced_ns.get(path) != changed_ns:
                self._synced_ns[path] = changed_ns
                os.fdatasync(self._fds[path])
                if self._mode is IoMode.BUFFERED:
                    os.posix_fadvise(self._fds[path], 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        self._store.close()
        for fd in self._fds.values():
            os.close(fd)
        for path in sorted(self._directory.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()


class WarmStore(Store):
    """The buffered path when the page cache has the pages: what that path is for."""

    can_write = False

    def __init__(self, directory: Path, shape: Shape, memory: memoryview) -> None:
        super().__init__(directory / "warm", shape, memory, IoMode.BUFFERED)
        self.name = "buffered, cached"
        for index in range(shape.slices):
            self.write(index)
        for index in range(shape.slices):
            self.read(index)


def noise(n_bytes: int) -> memoryview:
    """Aligned memory with random contents, touched, so that page faults are not measured."""
    memory = memoryview(mmap.mmap(-1, n_bytes))
    sample = random.Random(1).randbytes(MIB)
    for start in range(0, n_bytes, MIB):
        memory[start : start + MIB] = sample[: n_bytes - start]
    return memory


@contextlib.contextmanager
def all_systems(directory: Path, shape: Shape) -> Iterator[list[System]]:
    memory = noise(shape.pages_per_slice * shape.page_bytes)
    with contextlib.ExitStack() as stack:
        systems: list[System] = []

        def add(system: System) -> None:
            stack.callback(system.close)
            systems.append(system)

        for blocks in (FRESH, REWRITTEN):
            for io_bytes in (1 * MIB, 4 * MIB):
                add(Raw(directory, shape, memory, io_bytes, blocks))
        for mode in (IoMode.DIRECT, IoMode.BUFFERED):
            add(Store(directory, shape, memory, mode))
        add(Store(directory, shape, memory, IoMode.DIRECT, blocks=REWRITTEN))
        add(Store(directory, shape, memory, IoMode.DIRECT, key=KEY))
        add(WarmStore(directory, shape, memory))
        yield systems


@dataclass
class Times:
    wall_s: list[float]
    cpu_s: list[float]


def measure(directory: Path, shape: Shape) -> list[Row]:
    """All systems at one shape."""
    with all_systems(directory, shape) as systems:
        writes = [Times([], []) for _ in systems]
        reads = [Times([], []) for _ in systems]
        for index in range(shape.slices):
            take_turns(index, systems, writes, lambda s, i: s.write(i), lambda s: s.can_write)
        for index in range(shape.slices):
            # A full store has only its last slices left; raw blocks read alike, old or new.
            take_turns(
                index, systems, reads, lambda s, i: s.read(i),
                lambda s: s.is_raw or s.blocks == FRESH,
            )  # fmt: skip
        return summarise(shape, systems, writes, reads)


def take_turns(
    index: int,
    systems: list[System],
    times: list[Times],
    act: Callable[[System, int], None],
    takes_part: Callable[[System], bool],
) -> None:
    for turn in range(len(systems)):
        which = (index + turn) % len(systems)
        if takes_part(systems[which]):
            wall, cpu = time.perf_counter(), time.process_time()
            act(systems[which], index)
            times[which].wall_s.append(time.perf_counter() - wall)
            times[which].cpu_s.append(time.process_time() - cpu)
            systems[which].settle()


def summarise(
    shape: Shape, systems: list[System], writes: list[Times], reads: list[Times]
) -> list[Row]:
    gb = shape.pages_per_slice * shape.page_bytes / 1e9

    def median(values: list[float]) -> float | None:
        return statistics.median(values) if values else None

    def ratio_to_raw(times: list[Times], blocks: str, ours_s: list[float]) -> float | None:
        """Round by round, to the raw I/O size that is faster on the whole."""
        raw_s = min(
            (
                t.wall_s
                for s, t in zip(systems, times, strict=True)
                if s.is_raw and s.blocks == blocks
            ),
            key=statistics.median,
        )
        return median([r / o for r, o in zip(raw_s, ours_s, strict=True)]) if ours_s else None

    def over(a: float, b: float | None) -> float | None:
        return None if b is None else a / b

    rows = []
    for system, write, read in zip(systems, writes, reads, strict=True):
        write_s, read_s = median(write.wall_s), median(read.wall_s)
        cpu = [median(write.cpu_s), median(read.cpu_s)]
        rows.append(
            Row(
                shape.page_bytes / MIB,
                shape.threads,
                system.name,
                system.blocks,
                over(gb, write_s),
                over(gb, read_s),
                *(None if c is None else c / gb for c in cpu),
                ratio_to_raw(writes, system.blocks, write.wall_s),
                ratio_to_raw(reads, system.blocks, read.wall_s),
            )
        )
    return rows
