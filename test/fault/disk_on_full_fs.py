"""A process whose disk really is full, or may really not write any more; prints what happened.

Usage: disk_on_full_fs.py DIRECTORY small-fs|file-limit

small-fs: DIRECTORY becomes a memory file system of 24 MiB (needs a mount namespace of its own, see
`unshare --mount --map-root-user`). file-limit: files may not grow past 2 MiB (RLIMIT_FSIZE).
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tiered_kv.tiers.disk.namespace import DiskNamespace
from tiered_kv.tiers.disk.store import DiskStore

MIB = 1 << 20
PAGE_BYTES = 64 << 10
NO_MOUNT = 3


def page_hash(seed: int) -> bytes:
    return hashlib.sha256(b"page %d" % seed).digest()


def page(seed: int) -> memoryview:
    return memoryview(random.Random(seed).randbytes(PAGE_BYTES))


def write(ns: DiskNamespace, first: int, count: int) -> int:
    seeds = range(first, first + count)
    return ns.write_pages([page_hash(seed) for seed in seeds], [page(seed) for seed in seeds])


def unequal(ns: DiskNamespace, last: int) -> int:
    """Pages that are said to be stored and cannot be read back, equal."""
    buffer = memoryview(bytearray(PAGE_BYTES))
    stored = [seed for seed in range(last) if ns.contains(page_hash(seed))]
    return sum(
        ns.read_pages([page_hash(seed)], [buffer]) != 1 or buffer != page(seed) for seed in stored
    )


def fill_small_fs(directory: Path) -> Callable[[], None]:
    """Mounts, and takes half of the room away; returns what gives it back."""
    directory.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"none", os.fsencode(directory), b"tmpfs", 0, b"size=24m") != 0:
        sys.exit(NO_MOUNT)
    filler = directory.parent / directory.name / "filler"
    fd = os.open(filler, os.O_RDWR | os.O_CREAT)
    os.posix_fallocate(fd, 0, 12 * MIB)
    os.close(fd)
    return filler.unlink


def limit_files(directory: Path) -> Callable[[], None]:
    directory.mkdir()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MIB, hard))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def main() -> None:
    directory, scenario = Path(sys.argv[1]), sys.argv[2]
    make_room = {"small-fs": fill_small_fs, "file-limit": limit_files}[scenario](directory)
    store = DiskStore.open(directory / "disk", capacity_bytes=80 * MIB)
    ns = store.namespace(bytes(32), PAGE_BYTES)
    n_written = first = 0
    while not store.stats().degraded and first < 400:
        n_written += write(ns, first, 10)
        first += 10
    during = store.stats()
    n_unequal = unequal(ns, first)
    make_room()
    deadline = time.monotonic() + 20
    recovered = 0
    while not recovered and time.monotonic() < deadline:
        time.sleep(0.2)
        recovered = write(ns, 1000, 10)
    after = store.stats()
    store.close()
    with DiskStore.open(directory / "disk", capacity_bytes=80 * MIB) as store:
        ns = store.namespace(bytes(32), PAGE_BYTES)
        reopened, n_unequal_later = len(ns), unequal(ns, 1010)
    report = {
        "written": n_written,
        "tried": first,
        "degraded": during.degraded,
        "io_errors": during.io_errors,
        "pages": during.pages,
        "unequal": n_unequal + n_unequal_later,
        "recovered": recovered,
        "degraded_after": after.degraded,
        "pages_after_reopening": reopened,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
