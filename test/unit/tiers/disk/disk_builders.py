"""Pages and buffers for the tests of the disk tier."""

from __future__ import annotations

import hashlib
import mmap
import random
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tiered_kv.tiers.disk.namespace import DiskNamespace
from tiered_kv.tiers.disk.record import BLOCK_BYTES
from tiered_kv.tiers.disk.store import DiskStore

MIB = 1 << 20
PAGE_BYTES = 64 << 10
PATIENCE_S = 20.0
RECORD_BYTES = BLOCK_BYTES + PAGE_BYTES
NAMESPACE = hashlib.sha256(b"a model").digest()


def page_hash(seed: int) -> bytes:
    return hashlib.sha256(seed.to_bytes(8, "little")).digest()


def page_payload(seed: int, n_bytes: int) -> bytes:
    """Random bytes that depend only on the seed."""
    return random.Random(seed).randbytes(n_bytes)


def aligned(n_bytes: int) -> memoryview:
    """Memory that direct I/O takes as it is."""
    return memoryview(mmap.mmap(-1, n_bytes))


def filled(seed: int, n_bytes: int, length: int | None = None) -> memoryview:
    """An aligned buffer that holds the page of this seed (and is `length` long)."""
    view = aligned(length or n_bytes)
    view[:n_bytes] = page_payload(seed, n_bytes)
    return view


def write(ns: DiskNamespace, seeds: Sequence[int]) -> int:
    """Write the pages of these seeds."""
    buffers = [filled(seed, ns.page_bytes) for seed in seeds]
    return ns.write_pages([page_hash(seed) for seed in seeds], buffers)


def read(ns: DiskNamespace, seeds: Sequence[int]) -> int:
    """Read the pages of these seeds and compare each one returned; how many that were."""
    buffers = [aligned(ns.page_bytes) for _ in seeds]
    n_read = ns.read_pages([page_hash(seed) for seed in seeds], buffers)
    for seed, buffer in zip(seeds[:n_read], buffers, strict=False):
        assert buffer == page_payload(seed, ns.page_bytes), f"page {seed} differs"
    return n_read


def readable(ns: DiskNamespace, seeds: Iterable[int]) -> list[int]:
    """Seeds whose page can be read (and is equal)."""
    return [seed for seed in seeds if read(ns, [seed])]


def wait_until(is_so: Callable[[], bool]) -> None:
    """For what a thread of the store does behind."""
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def segment_files(directory: Path) -> list[Path]:
    return sorted((directory / "segments").glob("*.seg"))


def flip(path: Path, offset: int, n_bytes: int = 1) -> None:
    """Invert bytes in a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        old = file.read(n_bytes)
        file.seek(offset)
        file.write(bytes(byte ^ 0xFF for byte in old))


def disk_usage(directory: Path) -> int:
    """What `du` says: bytes of blocks that everything below the directory takes."""
    total = 0
    for path in [directory, *directory.rglob("*")]:
        try:
            total += path.lstat().st_blocks * 512
        except FileNotFoundError:
            continue
    return total


def record_offset(slot: int) -> int:
    """Where in its segment file the record of a page of PAGE_BYTES begins."""
    return BLOCK_BYTES + slot * RECORD_BYTES


def reopen(
    open_store: Callable[..., DiskStore], **options: object
) -> tuple[DiskStore, DiskNamespace]:
    store = open_store(**options)
    return store, store.namespace(NAMESPACE, PAGE_BYTES)
