"""A disk tier of ten terabytes: how long it is until it serves, takes writes, forgets, closes.

The store is the real one, with its index, its files (sparse) and all its threads; only the device
is simulated: it moves no bytes, takes the time that a device of `--gb-per-s` would, and remembers
of every record what it must know to answer a read. So it runs anywhere, in a few gigabytes of
memory.

Measured: opening a full store of ten million pages, and how long another thread of the process had
to wait meanwhile; then for `--seconds` writes as fast as the device takes them, which must reclaim
as much as they bring, beside reads, a thread that looks pages up as a scheduler does and a full
pass of the garbage collector: the longest time in which nothing was written, the longest lookup;
closing after pages all over the store were read; clearing. Beside what took long it says what the
machine had to do with it (see `delays.py`).

Example: python benchmark/micro/disk_at_scale.py --json benchmark/results/disk_at_scale.json
"""

from __future__ import annotations

import argparse
import gc
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
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from delays import (
    BEAT_S,
    Control,
    Distribution,
    Pulse,
    Times,
    slowest_call,
    slowest_collection,
)
from disk_index import current_rss, settle_index
from simulated_disk import NAMESPACE, SimulatedDisk, page_name

from tiered_kv.core.units import MIB
from tiered_kv.tiers.disk.budget import Budget
from tiered_kv.tiers.disk.index import NamespaceRow, PageIndex, SegmentRow
from tiered_kv.tiers.disk.namespace import DiskNamespace
from tiered_kv.tiers.disk.record import BLOCK_BYTES
from tiered_kv.tiers.disk.segment import PageRun, location
from tiered_kv.tiers.disk.store import DiskStore

FREE_SEGMENTS = 4
READ_SHARE = 0.2
"""Of the pages that are there at the start, so many were read since they were written."""


@dataclass
class Result:
    """Of a store that is full."""

    capacity_bytes: int
    pages: int
    segments: int
    segment_bytes: int
    index_bytes: int
    open_s: float
    open_cold_s: float
    beside_opening: Distribution
    """By how much another thread of the process, which slept for a millisecond, slept too long."""
    control_beside_opening: Distribution
    """Likewise another process."""
    memory_bytes_per_page: float
    count_prefix_2000_ms: float
    count_prefix_2000_scattered_ms: float
    seconds: float = 0.0
    written_gb_per_s: float = 0.0
    batch_mib: float = 0.0
    batches: Distribution | None = None
    """Of one thread that writes one batch after the other: in its longest nothing was written."""
    longest_wait_for_room_ms: float = 0.0
    reclaimed_segments: int = 0
    moved_pages: int = 0
    lookups: Distribution | None = None
    """Of 64 pages, beside the writes, together with `stats`."""
    control: Distribution | None = None
    """By how much a process that slept for a millisecond slept too long, beside the writes."""
    longest_choice_of_victim_ms: float = 0.0
    longest_collection_ms: float = 0.0
    """Of the garbage collector, beside the writes, in CPU time."""
    pages_read: int = 0
    save_order_of_use_and_close_s: float = 0.0
    clear_ms: float = 0.0
    clear_to_first_new_page_ms: float = 0.0
    batches_while_deleting: Distribution | None = None
    clear_to_all_deleted_s: float = 0.0
    index_bytes_after_clear: int = 0


def room_for(pages: int, page_bytes: int) -> tuple[int, int, int]:
    """Bytes, segments and slots of each for a store that is full but for some free segments."""
    record_bytes = page_bytes + BLOCK_BYTES
    about = Budget(2 * pages * record_bytes)
    slots = about.slots_per_segment(record_bytes)
    n_segments = pages // slots
    capacity = about.reserve_bytes + (n_segments + FREE_SEGMENTS) * about.cost(record_bytes, slots)
    if Budget(capacity).slots_per_segment(record_bytes) != slots:
        raise ValueError(f"{pages} pages are too few for segments of full size")
    return capacity, n_segments, slots


def fill(directory: Path, capacity: int, n_segments: int, slots: int, page_bytes: int) -> None:
    """A store with so many pages in it, as its index says."""
    DiskStore.open(directory, capacity_bytes=capacity).close()
    record_bytes = page_bytes + BLOCK_BYTES
    choose = np.random.default_rng(1)
    index = PageIndex(directory, wal_blocks=1000, sync_commits=False)
    index.put_runs([], [NamespaceRow(1, NAMESPACE, page_bytes, "benchmark")])
    for number in range(n_segments):
        path = directory / "segments" / f"{number:08d}.seg"
        path.touch()
        os.truncate(path, BLOCK_BYTES + slots * record_bytes)
        first = number * slots
        names = b"".join(page_name(n) for n in range(first, first + slots))
        # Batches of 64 pages were written one after the other.
        times = np.arange(first, first + slots, dtype="<u8") // 64 + 1
        was_read = np.packbits(choose.random(slots) < READ_SHARE).tobytes()
        newest = int(times[-1]) + n_segments * slots // 128
        index.put_segment(SegmentRow(number, record_bytes, slots, 0, newest, was_read))
        index.put_runs([PageRun(location(number, 0), 1, names, (times << 1).tobytes())])
    index.fold_log()
    index.close()


class Writes:
    """Batches of new pages, one after the other."""

    def __init__(self, ns: DiskNamespace, n_pages: int, first_number: int) -> None:
        self.times = Times()
        self._ns = ns
        self._number = first_number
        self._buffers = [memoryview(mmap.mmap(-1, ns.slot_bytes))] * n_pages

    def write(self) -> None:
        n = len(self._buffers)
        names = [page_name(number) for number in range(self._number, self._number + n)]
        self._number += n
        n_written: list[int] = []
        self.times.measure(lambda: n_written.append(self._ns.write_pages(names, self._buffers)))
        if n_written != [n]:
            raise RuntimeError("a write failed")


class Scale:
    """The store and what is done to it."""

    def __init__(self, directory: Path, options: argparse.Namespace) -> None:
        self._directory = directory
        self._page_bytes = int(options.page_mib * MIB)
        self._options = options
        self._n_batch = max(int(options.batch_mib * MIB) // self._page_bytes, 1)
        self._capacity, self.n_segments, self._slots = room_for(options.pages, self._page_bytes)
        fill(directory, self._capacity, self.n_segments, self._slots, self._page_bytes)
        self._pages = self.n_segments * self._slots
        self._io = SimulatedDisk(self._page_bytes, self._slots, options.gb_per_s * 1e9)

    def open(self) -> tuple[DiskStore, float]:
        started = time.perf_counter()
        store = DiskStore.open(
            self._directory, capacity_bytes=self._capacity, io_ops=self._io, io_threads=4
        )
        return store, time.perf_counter() - started

    def measure(self) -> Result:
        settle_index(self._directory)
        rss = current_rss()
        store, cold_s = self.open()
        # The second time it would find memory that the first has left.
        rss = current_rss() - rss
        store.close()
        control = Control()
        with Pulse(lambda: time.sleep(BEAT_S)) as pulse:
            store, open_s = self.open()
        stats = store.stats()
        ns = store.namespace(NAMESPACE, self._page_bytes)
        choose = random.Random(3)
        first = choose.randrange(self._pages - 2000)
        result = Result(
            capacity_bytes=self._capacity,
            pages=stats.pages,
            segments=stats.segments,
            segment_bytes=BLOCK_BYTES + self._slots * (BLOCK_BYTES + self._page_bytes),
            index_bytes=store._index.n_bytes,
            open_s=open_s,
            open_cold_s=cold_s,
            beside_opening=pulse.distribution(BEAT_S),
            control_beside_opening=control.end(),
            memory_bytes_per_page=rss / stats.pages,
            count_prefix_2000_ms=self._time_lookup(ns, range(first, first + 2000)),
            count_prefix_2000_scattered_ms=self._time_lookup(
                ns, [choose.randrange(self._pages) for _ in range(2000)]
            ),
        )
        self._write(store, ns, result)
        self._close(store, ns, result)
        store, _ = self.open()
        self._clear(store, result)
        return result

    def _time_lookup(self, ns: DiskNamespace, numbers: Sequence[int]) -> float:
        names = [page_name(n) for n in numbers]
        started = time.perf_counter()
        if ns.count_prefix(names) != len(names):
            raise RuntimeError("pages are missing")
        return (time.perf_counter() - started) * 1e3

    def _write(self, store: DiskStore, ns: DiskNamespace, result: Result) -> None:
        choose = random.Random(5)
        deadline = time.perf_counter() + self._options.seconds
        before = store.stats()
        choosing = slowest_call(store._keeper._reclaimer, "_choose_victim")
        allocating = slowest_call(store._space, "allocate")
        collecting = slowest_collection()

        def look_up() -> None:
            first = choose.randrange(self._pages)
            ns.count_prefix([page_name(i) for i in range(first, first + 64)])
            store.stats()

        def read() -> None:
            targets = [memoryview(mmap.mmap(-1, ns.slot_bytes)) for _ in range(8)]
            while time.perf_counter() < deadline:
                first = choose.randrange(self._pages)
                ns.read_pages([page_name(i) for i in range(first, first + 8)], targets)

        reader = threading.Thread(target=read)
        writes = Writes(ns, self._n_batch, self._pages)
        control = Control()
        with Pulse(look_up) as pulse:
            reader.start()
            threading.Timer(self._options.seconds / 2, gc.collect).start()
            while time.perf_counter() < deadline:
                writes.write()
            reader.join()
        result.control = control.end()
        after = store.stats()
        result.seconds = self._options.seconds
        result.batch_mib = self._n_batch * self._page_bytes / MIB
        seconds = writes.times.seconds
        n_bytes = len(seconds) * self._n_batch * self._page_bytes
        result.written_gb_per_s = n_bytes / sum(seconds) / 1e9
        result.batches = writes.times.distribution()
        result.longest_wait_for_room_ms = allocating[0] * 1e3
        result.reclaimed_segments = after.reclaimed_segments - before.reclaimed_segments
        result.moved_pages = after.moved_pages - before.moved_pages
        result.lookups = pulse.distribution()
        result.longest_choice_of_victim_ms = choosing[0] * 1e3
        result.longest_collection_ms = collecting[0] * 1e3
        result.pages_read = after.reads - before.reads

    def _close(self, store: DiskStore, ns: DiskNamespace, result: Result) -> None:
        for number in range(self.n_segments):
            ns.touch([page_name(number * self._slots + self._slots // 2)])
        started = time.perf_counter()
        store.close()
        result.save_order_of_use_and_close_s = time.perf_counter() - started

    def _clear(self, store: DiskStore, result: Result) -> None:
        ns = store.namespace(NAMESPACE, self._page_bytes)
        started = time.perf_counter()
        store.clear()
        result.clear_ms = (time.perf_counter() - started) * 1e3
        if len(ns) or store.stats().pages:
            raise RuntimeError("not cleared")
        Writes(ns, 1, 0).write()
        result.clear_to_first_new_page_ms = (time.perf_counter() - started) * 1e3
        deleting = threading.Thread(target=store.collect_garbage)
        deleting.start()
        writes = Writes(ns, self._n_batch, 1)
        while deleting.is_alive():
            writes.write()
        result.batches_while_deleting = writes.times.distribution()
        result.clear_to_all_deleted_s = time.perf_counter() - started
        result.index_bytes_after_clear = store._index.n_bytes
        store.close()


def tell(result: Result) -> None:
    for field in fields(result):
        value = getattr(result, field.name)
        if isinstance(value, Distribution):
            value = ", ".join(f"{name} {number:,.4g}" for name, number in asdict(value).items())
        elif isinstance(value, float):
            value = f"{value:,.2f}"
        print(f"{field.name:<34} {value}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, help="where the index and sparse files go")
    parser.add_argument("--pages", type=int, default=10_000_000)
    parser.add_argument("--page-mib", type=float, default=1.0)
    parser.add_argument("--batch-mib", type=float, default=16.0, help="data of one write")
    parser.add_argument("--gb-per-s", type=float, default=3.0, help="what the device can do")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    directory = Path(tempfile.mkdtemp(dir=options.directory, prefix="tiered-kv-scale-"))
    try:
        result = Scale(directory / "disk", options).measure()
    finally:
        shutil.rmtree(directory)
    tell(result)
    if options.json is not None:
        machine = {
            "cpu_count": os.cpu_count(),
            "kernel": platform.release(),
            "load_average": os.getloadavg(),
        }
        options_used = {k: v for k, v in vars(options).items() if not isinstance(v, Path | None)}
        report = {"machine": machine, "options": options_used, "result": asdict(result)}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
