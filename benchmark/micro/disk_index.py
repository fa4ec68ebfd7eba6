"""The index part of `disk.py`: open to first lookup, and batched lookups, at a million pages."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from tiered_kv.core.units import MIB
from tiered_kv.tiers.disk.budget import Budget
from tiered_kv.tiers.disk.index import NamespaceRow, PageIndex, SegmentRow
from tiered_kv.tiers.disk.record import BLOCK_BYTES
from tiered_kv.tiers.disk.segment import location, runs_of
from tiered_kv.tiers.disk.store import DiskStore

NAMESPACE = hashlib.sha256(b"benchmark").digest()
INDEX_TARGET_OPEN_S = 5.0
INDEX_TARGET_LOOKUP_S = 0.020


@dataclass(frozen=True)
class IndexResult:
    """The index at `pages` pages."""

    pages: int
    index_bytes: int
    open_to_first_lookup_s: float
    open_to_first_lookup_cold_s: float
    lookup_pages: int
    count_prefix_ms_median: float
    count_prefix_ms_max: float
    memory_bytes_per_page: float


def make_index(directory: Path, pages: int, page_bytes: int, capacity: int) -> list[bytes]:
    """A directory whose index knows `pages` pages, in sparse segment files."""
    with DiskStore.open(directory, capacity_bytes=capacity) as store:
        store.namespace(NAMESPACE, page_bytes, "benchmark")
    record_bytes = page_bytes + BLOCK_BYTES
    slots = Budget(capacity).slots_per_segment(record_bytes)
    hashes = [hashlib.sha256(b"page %d" % n).digest() for n in range(pages)]
    index = PageIndex(directory, wal_blocks=1000, sync_commits=False)
    index.put_runs([], [NamespaceRow(1, NAMESPACE, page_bytes, "benchmark")])
    for number, start in enumerate(range(0, pages, slots)):
        path = directory / "segments" / f"{number:08d}.seg"
        path.touch()
        os.truncate(path, BLOCK_BYTES + slots * record_bytes)
        index.put_segment(SegmentRow(number, record_bytes, slots, generation=0))
        index.put_runs(
            runs_of(
                (location(number, slot), 1, page_hash, (start + slot + 1) << 1)
                for slot, page_hash in enumerate(hashes[start : start + slots])
            )
        )
    index.fold_log()
    index.close()
    return hashes


def open_and_look_up(directory: Path, capacity: int, page_bytes: int, page_hash: bytes) -> float:
    """Seconds from opening the store to the answer of the first lookup."""
    started = time.perf_counter()
    with DiskStore.open(directory, capacity_bytes=capacity) as store:
        found = store.namespace(NAMESPACE, page_bytes).contains(page_hash)
        elapsed_s = time.perf_counter() - started
    if not found:
        raise RuntimeError("a page is missing from the index")
    return elapsed_s


def measure_index(directory: Path, pages: int, lookup_pages: int, repeats: int) -> IndexResult:
    """Build, open and look up an index of `pages` pages below `directory`."""
    page_bytes = 1 * MIB
    capacity = pages * (page_bytes + 8192) * 2
    directory = directory / "index"
    hashes = make_index(directory, pages, page_bytes, capacity)
    index_bytes = sum(p.stat().st_size for p in directory.glob("index.sqlite*"))
    cold = []
    for _ in range(repeats):
        settle_index(directory)
        cold.append(open_and_look_up(directory, capacity, page_bytes, hashes[-1]))
    warm = [open_and_look_up(directory, capacity, page_bytes, hashes[-1]) for _ in range(repeats)]
    before = current_rss()
    with DiskStore.open(directory, capacity_bytes=capacity) as store:
        per_page = (current_rss() - before) / pages
        namespace = store.namespace(NAMESPACE, page_bytes)
        lookups = []
        choose = random.Random(3)
        for _ in range(50):
            first = choose.randrange(max(pages - lookup_pages, 1))
            # Fresh bytes objects, as a request's hashes are: no cached hash values.
            wanted = [bytes(bytearray(h)) for h in hashes[first : first + lookup_pages]]
            started = time.perf_counter()
            found = namespace.count_prefix(wanted)
            lookups.append(time.perf_counter() - started)
            if found != len(wanted):
                raise RuntimeError("pages are missing from the index")
    shutil.rmtree(directory)
    return IndexResult(
        pages,
        index_bytes,
        statistics.median(warm),
        statistics.median(cold),
        lookup_pages,
        statistics.median(lookups) * 1e3,
        max(lookups) * 1e3,
        per_page,
    )


def settle_index(directory: Path) -> None:
    for path in directory.glob("index.sqlite*"):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def current_rss() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def print_index(result: IndexResult) -> None:
    def verdict(value: float, target: float) -> str:
        return "within" if value <= target else "MISSES"

    print(f"\nindex of {result.pages:,} pages, {result.index_bytes / MIB:.0f} MiB")
    for label, value in (
        ("page cache warm", result.open_to_first_lookup_s),
        ("page cache cold", result.open_to_first_lookup_cold_s),
    ):
        print(
            f"  open to first lookup, {label}: {value:.2f} s "
            f"({verdict(value, INDEX_TARGET_OPEN_S)} {INDEX_TARGET_OPEN_S:g} s)"
        )
    print(
        f"  count_prefix of {result.lookup_pages:,} pages: median "
        f"{result.count_prefix_ms_median:.3f} ms, longest {result.count_prefix_ms_max:.3f} ms "
        f"({verdict(result.count_prefix_ms_median / 1e3, INDEX_TARGET_LOOKUP_S)} "
        f"{INDEX_TARGET_LOOKUP_S * 1e3:g} ms)"
    )
    print(f"  memory: {result.memory_bytes_per_page:.0f} bytes per page")
