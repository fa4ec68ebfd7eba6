"""Opens a disk tier on a file system that really is full or read-only; prints what happened.

Usage: disk_state_fs.py DIRECTORY full|full-after-a-crash|read-only|read-only-after-a-crash

DIRECTORY becomes a memory file system (needs a mount namespace of its own, see
`unshare --mount --map-root-user`).
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import io
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

from tiered_kv.disk import main as disk_tool
from tiered_kv.tiers.disk import tier as tier_module
from tiered_kv.tiers.disk.shards import ShardOpener
from tiered_kv.tiers.disk.store import Access, DiskStore
from tiered_kv.tiers.disk.tier import DiskTier, TierNamespace

NO_MOUNT = 3
MIB = 1 << 20
PAGE_BYTES = 64 << 10
MS_RDONLY, MS_REMOUNT = 1, 32
libc = ctypes.CDLL(None, use_errno=True)


def page(seed: int) -> memoryview:
    return memoryview(bytearray(random.Random(seed).randbytes(PAGE_BYTES)))


def hashes(seeds: range) -> list[bytes]:
    return [hashlib.sha256(b"page %d" % seed).digest() for seed in seeds]


def write(ns: TierNamespace, seeds: range) -> int:
    return ns.write_pages(hashes(seeds), [page(seed) for seed in seeds])


def read(ns: TierNamespace, seeds: range) -> int:
    buffers = [memoryview(bytearray(PAGE_BYTES)) for _ in seeds]
    n_read = ns.read_pages(hashes(seeds), buffers)
    for seed, buffer in zip(seeds[:n_read], buffers, strict=False):
        assert buffer == page(seed)
    return n_read


def open_tier(directory: Path) -> DiskTier:
    def open_store(path: Path, access: Access) -> DiskStore:
        return DiskStore.open(path, capacity_bytes=64 * MIB, access=access)

    return DiskTier.open(ShardOpener(directory, 0, 1, "a", open_store), "shard", 64 * MIB)


def store_pages(directory: Path, *, crash: bool) -> None:
    """In a process of its own: what it leaves open dies with it."""
    tier = open_tier(directory)
    assert write(tier.namespace(bytes(32), PAGE_BYTES), range(20)) == 20
    if crash:
        os._exit(0)
    tier.close(10.0)


def fill(directory: Path) -> Path:
    filler = directory / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return filler


def mount(directory: Path, flags: int) -> int:
    return libc.mount(b"tmpfs", str(directory).encode(), b"tmpfs", flags, b"size=32m")


def inspect(directory: Path) -> tuple[int, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = disk_tool(["inspect", str(directory)])
    return status, out.getvalue() + err.getvalue()


def main() -> None:
    directory, scenario = Path(sys.argv[1]), sys.argv[2]
    if scenario == "store":
        store_pages(directory, crash=sys.argv[3] == "crash")
        return
    crashed = scenario.endswith("after-a-crash")
    directory.mkdir()
    if mount(directory, 0) != 0:
        sys.exit(NO_MOUNT)
    how = "crash" if crashed else "close"
    kv = directory / "kv"
    subprocess.run([sys.executable, __file__, str(kv), "store", how], check=True)
    filler = None
    if scenario.startswith("full"):
        filler = fill(directory)
    elif mount(directory, MS_REMOUNT | MS_RDONLY) != 0:
        sys.exit(NO_MOUNT)
    status, table = inspect(kv)
    before = sorted(str(path) for path in kv.rglob("*"))
    tier_module.LONGEST_PAUSE_S = 0.2
    tier = open_tier(kv)
    ns = tier.namespace(bytes(32), PAGE_BYTES)
    report = {
        "inspect_status": status,
        "inspect_shows_pages": " 20 " in table,
        "inspect_says": table,
        "degraded": tier.stats().degraded,
        "read": read(ns, range(20)),
        "written": write(ns, range(100, 105)),
        "side_files": len(set(map(str, kv.rglob("*"))) - set(before)),
    }
    if filler is not None:
        filler.unlink()
    else:
        mount(directory, MS_REMOUNT)
    deadline = time.monotonic() + 20
    while tier.stats().degraded and time.monotonic() < deadline:
        time.sleep(0.05)
    report |= {
        "degraded_after": tier.stats().degraded,
        "read_after": read(ns, range(20)),
        "written_after": write(ns, range(100, 105)),
    }
    tier.close(10.0)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
