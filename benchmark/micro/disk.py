"""The disk tier against the raw disk, and its index at a million pages.

Throughput: batches of pages are written to and read from a fresh store, through each path and with
each number of I/O threads, in turn with a plain loop of O_DIRECT pwritev/preadv on a preallocated
file in the same directory ("raw"; the better of 1 MiB and 4 MiB I/Os). The ratio of both is shown.
Written data is on the device when the clock stops (fdatasync) and page caches are dropped before
reading, so both paths move every byte to or from the disk.

Index: a store with a million pages (segment files are sparse, nothing is read from them) is opened
with a cold page cache; batched lookups are timed.

Example: python benchmark/micro/disk.py --directory /mnt/nvme --quick
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import os
import platform
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from disk_index import measure_index, print_index

from tiered_kv.tiers.disk.record import BLOCK_BYTES
from tiered_kv.tiers.disk.store import DiskStore

MIB = 1 << 20
NAMESPACE = hashlib.sha256(b"benchmark").digest()
STORE_BYTES = 8 << 30  # segments of half a GiB, as a real store has; only those in use exist
RAW_IO_BYTES = (1 * MIB, 4 * MIB)


@dataclass(frozen=True)
class Sample:
    """One pass over the data."""

    write_s: float
    read_s: float
    write_cpu_s: float
    read_cpu_s: float


@dataclass(frozen=True)
class Row:
    """The best of the repeats for one page size, thread count and path."""

    page_mib: float
    threads: int
    path: str
    write_gb_s: float
    read_gb_s: float
    write_cpu_s_per_gb: float
    read_cpu_s_per_gb: float
    write_ratio_to_raw: float
    read_ratio_to_raw: float


def buffers_of(count: int, page_bytes: int) -> list[memoryview]:
    """Aligned buffers with random contents, touched, so that page faults are not measured."""
    memory = memoryview(mmap.mmap(-1, count * page_bytes))
    noise = random.Random(1).randbytes(min(page_bytes, MIB))
    views = [memory[i * page_bytes : (i + 1) * page_bytes] for i in range(count)]
    for view in views:
        for start in range(0, page_bytes, len(noise)):
            view[start : start + len(noise)] = noise[: page_bytes - start]
    return views


@contextmanager
def timed(results: list[float]) -> Iterator[None]:
    """Appends wall-clock and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    results += [time.perf_counter() - wall, time.process_time() - cpu]


def settle(directory: Path) -> None:
    """Put the files below a directory on the device and out of the page cache."""
    for path in directory.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDWR)
            os.fdatasync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def run_store(
    directory: Path, *, direct: bool, threads: int, buffers: list[memoryview], batches: int
) -> Sample:
    """Write and read `batches` batches of pages through a fresh store."""
    page_bytes = len(buffers[0])
    total = batches * len(buffers) * (page_bytes + BLOCK_BYTES)
    directory = directory / "store"
    hashes = [
        [hashlib.sha256(b"%d %d" % (b, i)).digest() for i in range(len(buffers))]
        for b in range(batches)
    ]
    write: list[float] = []
    read: list[float] = []
    with DiskStore.open(
        directory, capacity_bytes=max(total * 2, STORE_BYTES), io_threads=threads, direct_io=direct
    ) as store:
        namespace = store.namespace(NAMESPACE, page_bytes)
        with timed(write):
            for batch in hashes:
                if namespace.write_pages(batch, buffers) != len(buffers):
                    raise RuntimeError("a write failed")
            settle(directory / "segments")
        settle(directory / "segments")
        with timed(read):
            for batch in hashes:
                if namespace.read_pages(batch, buffers) != len(buffers):
                    raise RuntimeError("a read failed")
    shutil.rmtree(directory)
    return Sample(write[0], read[0], write[1], read[1])


def run_raw(
    directory: Path, *, threads: int, io_bytes: int, buffers: list[memoryview], total: int
) -> Sample:
    """The same bytes, with nothing but system calls."""
    path = directory / "raw"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
    os.posix_fallocate(fd, 0, total)
    memory = memoryview(buffers[0].obj)
    offsets = range(0, total - io_bytes + 1, io_bytes)
    write: list[float] = []
    read: list[float] = []
    try:
        for times, call in ((write, os.pwritev), (read, os.preadv)):
            with timed(times):
                spread(threads, offsets, memory, io_bytes, lambda o, b, c=call: c(fd, [b], o))
                os.fdatasync(fd)
    finally:
        os.close(fd)
        path.unlink()
    return Sample(write[0], read[0], write[1], read[1])


def spread(
    threads: int,
    offsets: range,
    memory: memoryview,
    io_bytes: int,
    call: Callable[[int, memoryview], int],
) -> None:
    """Each thread takes every n-th offset and a buffer of its own."""

    def work(worker: int) -> None:
        start = worker * io_bytes % (len(memory) - io_bytes + 1) & -BLOCK_BYTES
        for offset in offsets[worker::threads]:
            call(offset, memory[start : start + io_bytes])

    workers = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def measure_throughput(options: argparse.Namespace, directory: Path) -> list[Row]:
    """All combinations; within one, raw and both paths take turns `repeats` times."""
    rows = []
    for page_mib in options.page_mib:
        page_bytes = int(page_mib * MIB)
        per_batch = max(options.batch_mib * MIB // page_bytes, 1)
        buffers = buffers_of(per_batch, page_bytes)
        batches = max(options.data_mib * MIB // (per_batch * page_bytes), 1)
        total = batches * per_batch * page_bytes
        for threads in options.threads:
            samples: dict[str, list[Sample]] = {}
            for _ in range(options.repeats):
                for io_bytes in RAW_IO_BYTES:
                    raw = run_raw(
                        directory, threads=threads, io_bytes=io_bytes, buffers=buffers, total=total
                    )
                    samples.setdefault(f"raw {io_bytes // MIB} MiB", []).append(raw)
                for path in options.paths:
                    ours = run_store(
                        directory,
                        direct=path == "direct",
                        threads=threads,
                        buffers=buffers,
                        batches=batches,
                    )
                    samples.setdefault(path, []).append(ours)
            new = summarise(page_mib, threads, total, samples)
            rows += new
            for row in new:
                print_row(row)
    return rows


def summarise(
    page_mib: float, threads: int, total: int, samples: dict[str, list[Sample]]
) -> list[Row]:
    # What else the machine does can only slow a pass down: the best pass is the truest.
    def best(path: str, field: str) -> float:
        return min(getattr(sample, field) for sample in samples[path])

    raw_paths = [path for path in samples if path.startswith("raw")]
    best_write = min(best(path, "write_s") for path in raw_paths)
    best_read = min(best(path, "read_s") for path in raw_paths)
    gb = total / 1e9
    return [
        Row(
            page_mib,
            threads,
            path,
            gb / best(path, "write_s"),
            gb / best(path, "read_s"),
            best(path, "write_cpu_s") / gb,
            best(path, "read_cpu_s") / gb,
            best_write / best(path, "write_s"),
            best_read / best(path, "read_s"),
        )
        for path in samples
    ]


HEADINGS = (
    "page MiB", "threads", "path", "write GB/s", "read GB/s", "CPU s/GB write", "CPU s/GB read",
    "write/raw", "read/raw",
)  # fmt: skip


def print_headings() -> None:
    print("  ".join(f"{name:>{max(len(name), 9)}}" for name in HEADINGS))


def print_row(row: Row) -> None:
    values = [
        f"{row.page_mib:g}", str(row.threads), row.path, f"{row.write_gb_s:.2f}",
        f"{row.read_gb_s:.2f}", f"{row.write_cpu_s_per_gb:.3f}", f"{row.read_cpu_s_per_gb:.3f}",
        f"{row.write_ratio_to_raw:.2f}", f"{row.read_ratio_to_raw:.2f}",
    ]  # fmt: skip
    pairs = zip(values, HEADINGS, strict=True)
    print("  ".join(f"{value:>{max(len(name), 9)}}" for value, name in pairs), flush=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--directory", type=Path, help="where to put the files (default: the temporary directory)"
    )
    parser.add_argument("--quick", action="store_true", help="less of everything: half a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    parser.add_argument("--page-mib", type=float, nargs="+", default=[0.25, 1, 4])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument(
        "--paths", nargs="+", choices=["direct", "buffered"], default=["direct", "buffered"]
    )
    parser.add_argument("--data-mib", type=int, default=512, help="data per pass (default 512)")
    parser.add_argument(
        "--batch-mib", type=int, default=64, help="data per call of the store (default 64)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="passes; the best is shown")
    parser.add_argument("--index-pages", type=int, default=1_000_000, help="0 leaves it out")
    parser.add_argument("--lookup-pages", type=int, default=2_000)
    options = parser.parse_args(arguments)
    if options.quick:
        options.page_mib, options.threads = [1], [2, 4]
        options.data_mib, options.repeats = min(options.data_mib, 128), 2
        options.index_pages = min(options.index_pages, 200_000)
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    rows: list[Row] = []
    index = None
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="tiered-kv-bench-") as name:
        directory = Path(name)
        if options.page_mib and options.data_mib:
            print_headings()
            rows = measure_throughput(options, directory)
        if options.index_pages:
            index = measure_index(
                directory, options.index_pages, options.lookup_pages, options.repeats
            )
            print_index(index)
    if options.json is not None:
        results = {
            "machine": {"cpu_count": os.cpu_count(), "kernel": platform.release()},
            "options": {k: v for k, v in vars(options).items() if not isinstance(v, Path)},
            "throughput": [asdict(row) for row in rows],
            "index": None if index is None else asdict(index),
        }
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
