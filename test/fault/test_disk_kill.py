"""`kill -9` of a writing process, at random instants, round after round on one directory.

After every kill the directory is opened again. Guaranteed: every page that was acknowledged is
there and equal; no page that is returned differs from what was written; where the budget is small,
an acknowledged page may have made room for another, but is never returned torn. Rounds take
turns between the I/O paths; half of the runs are encrypted. The number of rounds of each run is 8
(TIERED_KV_KILL_ROUNDS changes it).
"""

from __future__ import annotations

import mmap
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tiered_kv.tiers.disk.namespace import DiskNamespace
from tiered_kv.tiers.disk.store import DiskStore

sys.path.insert(0, str(Path(__file__).parent))

from disk_writer import BATCH_PAGES, NAMESPACE, SEEDS_PER_ROUND, THREADS, page_hash, page_payload

MIB = 1 << 20
ROUNDS = int(os.environ.get("TIERED_KV_KILL_ROUNDS", "8"))
PAGE_BYTES = 23_040
LONGEST_ROUND_S = 0.25


def supports_direct_io(directory: Path) -> bool:
    with DiskStore.open(directory, capacity_bytes=8 * MIB) as store:
        return store.stats().direct_io


def run_and_kill(directory: Path, first_seed: int, capacity_bytes: int, choose: random.Random,
                 path: str, key: bytes | None) -> list[int]:  # fmt: skip
    """Seeds acknowledged before the kill."""
    arguments = [str(directory), str(first_seed), str(capacity_bytes), str(PAGE_BYTES), path]
    if key is not None:
        arguments.append(key.hex())
    writer = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "disk_writer.py"), *arguments],
        stdout=subprocess.PIPE,
    )
    assert writer.stdout is not None
    # One round in eight dies while it opens the store.
    if choose.random() < 1 / 8:
        time.sleep(choose.uniform(0.05, 0.3))
        writer.send_signal(signal.SIGKILL)
        output = writer.stdout.read()
    else:
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(choose.uniform(0, LONGEST_ROUND_S))
        writer.send_signal(signal.SIGKILL)
        output = writer.stdout.read()
    writer.wait()
    writer.stdout.close()
    assert writer.returncode == -signal.SIGKILL
    # What follows the last newline was cut by the kill.
    lines = output.decode().split("\n")[:-1]
    return [int(seed) for line in lines if line != "ready" for seed in line.split()]


def check_pages(ns: DiskNamespace, seeds: list[int]) -> tuple[int, int]:
    """(pages read back, pages missing); fails on a page that is returned but not equal."""
    buffer = memoryview(mmap.mmap(-1, ns.slot_bytes))
    found = missing = 0
    for seed in seeds:
        if ns.read_pages([page_hash(seed)], [buffer]) == 1:
            assert buffer[:PAGE_BYTES] == page_payload(seed, PAGE_BYTES), f"page {seed} is torn"
            found += 1
        else:
            missing += 1
    return found, missing


def possibly_written(first_seed: int, acknowledged: list[int]) -> list[int]:
    """Everything the writer may have got to disk, acknowledged or not."""
    last = max(acknowledged, default=first_seed)
    return list(range(first_seed, last + 4 * THREADS * BATCH_PAGES))


@pytest.mark.slow
@pytest.mark.timeout(60 + 10 * ROUNDS)
@pytest.mark.parametrize("key", [None, bytes(range(32))], ids=["plain", "encrypted"])
@pytest.mark.parametrize("capacity_mib", [512, 12], ids=["ample", "churn"])
def test_kill_rounds(tmp_path: Path, capacity_mib: int, key: bytes | None) -> None:
    directory = tmp_path / "disk"
    paths = ["auto", "buffered"]
    if supports_direct_io(tmp_path / "probe"):
        paths.append("direct")
    choose = random.Random(capacity_mib)
    is_ample = capacity_mib > 100
    kept: list[int] = []
    total = 0
    for round_number in range(ROUNDS):
        first_seed = round_number * SEEDS_PER_ROUND
        acknowledged = run_and_kill(
            directory, first_seed, capacity_mib * MIB, choose, choose.choice(paths), key
        )
        total += len(acknowledged)
        kept += acknowledged
        with DiskStore.open(directory, capacity_bytes=capacity_mib * MIB, key=key) as store:
            ns = store.namespace(NAMESPACE, PAGE_BYTES)
            check_pages(ns, possibly_written(first_seed, acknowledged))
            older = choose.sample(kept, len(kept) // 10)
            is_last = round_number == ROUNDS - 1
            _, missing = check_pages(ns, kept if is_last else acknowledged + older)
            if is_ample:
                assert missing == 0, f"{missing} acknowledged pages lost in round {round_number}"
                assert store.stats().dropped_pages == 0
            assert store.stats().checksum_failures == 0
            assert store.stats().bytes_on_disk <= capacity_mib * MIB
            if store.stats().bytes_on_disk > capacity_mib * MIB // 2 and is_ample:
                _, missing = check_pages(ns, kept)
                assert missing == 0
                store.clear()
                kept.clear()
    assert total > ROUNDS, "the writer was hardly ever alive long enough to write"
    print(f"{ROUNDS} rounds, {total} pages acknowledged")
