"""A process that writes pages as fast as it can and prints the ones acknowledged: to be killed.

Usage: disk_writer.py DIRECTORY FIRST_SEED CAPACITY_BYTES PAGE_BYTES IO_MODE [KEY_HEX]

Prints `ready` once the store is open, then one line of seeds per acknowledged batch. Two threads
write and a third reads, so that a kill can fall into allocation, data, commit, read and reclaim.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import random
import sys
import threading
from pathlib import Path

from tiered_kv.tiers.disk.io_path import IoMode, Reuse
from tiered_kv.tiers.disk.namespace import DiskNamespace
from tiered_kv.tiers.disk.store import DiskStore

NAMESPACE = hashlib.sha256(b"fault test").digest()
SEEDS_PER_ROUND = 1 << 20
THREADS = 2
BATCH_PAGES = 12


def page_hash(seed: int) -> bytes:
    return hashlib.sha256(b"page %d" % seed).digest()


def page_payload(seed: int, n_bytes: int) -> bytes:
    """Different in every block, so that a mix of two pages shows."""
    return random.Random(seed).randbytes(n_bytes)


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
        n_written = ns.write_pages([page_hash(s) for s in seeds], buffers[: len(seeds)], reuse)
        if n_written == len(seeds):
            os.write(1, (" ".join(map(str, seeds)) + "\n").encode())


def read_for_ever(ns: DiskNamespace, first_seed: int) -> None:
    """Gives some pages their second chance, so that reclaim has something to move."""
    buffer = memoryview(mmap.mmap(-1, ns.slot_bytes))
    choose = random.Random(first_seed)
    seed = first_seed
    while True:
        seed = seed + 1 if ns.contains(page_hash(seed + 1)) else first_seed
        if choose.random() < 0.3:
            ns.read_pages([page_hash(seed)], [buffer])


def main() -> None:
    directory, first_seed, capacity_bytes, page_bytes, path, *keys = sys.argv[1:]
    store = DiskStore.open(
        Path(directory),
        capacity_bytes=int(capacity_bytes),
        io_mode=IoMode(path),
        key=bytes.fromhex(keys[0]) if keys else None,
    )
    ns = store.namespace(NAMESPACE, int(page_bytes))
    os.write(1, b"ready\n")
    jobs = [(write_for_ever, int(first_seed) + i) for i in range(THREADS)]
    jobs.append((read_for_ever, int(first_seed)))
    threads = [threading.Thread(target=job, args=(ns, seed), daemon=True) for job, seed in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
