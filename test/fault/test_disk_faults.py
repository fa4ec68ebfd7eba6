"""A full file system, a limit on files, and a disk that hangs: real ones, as far as a test can.

Errors that only a broken device gives (EIO, short transfers, bad blocks) are injected below the
store in `test/unit/tiers/disk/test_faults.py`. Guaranteed in all cases: no exception, no wrong
page, reads of what can be read go on, the tier says that it is degraded and comes back by itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tiered_kv.tiers.disk.io_ops import IoOps
from tiered_kv.tiers.disk.namespace import DiskNamespace
from tiered_kv.tiers.disk.stall_watch import STALL_AFTER_S, StallWatch
from tiered_kv.tiers.disk.store import DiskStore

MIB = 1 << 20
PAGE_BYTES = 64 << 10
STALL_S = 5.0
PROGRAM = Path(__file__).parent / "disk_on_full_fs.py"
NO_MOUNT = 3


def run_program(prefix: Sequence[str], directory: Path, scenario: str) -> dict[str, int]:
    run = subprocess.run(
        [*prefix, sys.executable, str(PROGRAM), str(directory), scenario],
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode == NO_MOUNT or "unshare: " in run.stderr:
        pytest.skip("no file system can be mounted here")
    assert run.returncode == 0, run.stderr
    lines = [line for line in run.stderr.splitlines() if line.startswith("Disk tier")]
    assert len([line for line in lines if "stops writing" in line]) == 1, run.stderr
    assert len([line for line in lines if "writes again" in line]) == 1, run.stderr
    report: dict[str, int] = json.loads(run.stdout)
    return report


@pytest.mark.parametrize("scenario", ["small-fs", "file-limit"])
def test_no_room(tmp_path: Path, scenario: str) -> None:
    prefix: list[str] = []
    if scenario == "small-fs":
        if shutil.which("unshare") is None:
            pytest.skip("no unshare(1)")
        prefix = ["unshare", "--mount", "--map-root-user"]
    report = run_program(prefix, tmp_path / "fs", scenario)
    assert report["degraded"]
    assert report["io_errors"] >= 1
    assert report["written"] < report["tried"]
    assert report["pages"] == report["written"]
    assert report["recovered"] == 10
    assert not report["degraded_after"]
    assert report["unequal"] == 0
    assert report["pages_after_reopening"] == report["written"] + 10


# -- a disk that hangs


class HangingIo(IoOps):
    """Data calls wait while the disk hangs."""

    def __init__(self) -> None:
        self.answers = threading.Event()
        self.answers.set()
        self.n_waiting = 0

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self._wait()
        return super().pwritev(fd, buffers, offset)

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self._wait()
        return super().preadv(fd, buffers, offset)

    def _wait(self) -> None:
        self.n_waiting += 1
        self.answers.wait()
        self.n_waiting -= 1


def page_hash(seed: int) -> bytes:
    return hashlib.sha256(b"page %d" % seed).digest()


def page(seed: int) -> bytes:
    return random.Random(seed).randbytes(PAGE_BYTES)


def write(ns: DiskNamespace, seeds: Sequence[int]) -> int:
    return ns.write_pages([page_hash(s) for s in seeds], [memoryview(page(s)) for s in seeds])


def read(ns: DiskNamespace, seeds: Sequence[int]) -> int:
    buffers = [memoryview(bytearray(PAGE_BYTES)) for _ in seeds]
    n_read = ns.read_pages([page_hash(seed) for seed in seeds], buffers)
    for seed, buffer in zip(seeds[:n_read], buffers, strict=False):
        assert buffer == page(seed)
    return n_read


@pytest.fixture
def io() -> Iterator[HangingIo]:
    io = HangingIo()
    yield io
    io.answers.set()


def test_stall(tmp_path: Path, io: HangingIo, caplog: pytest.LogCaptureFixture) -> None:
    """A read that was caught by the stall gets the right pages in the end, a write is left to
    itself with the pages it was given; nobody else waits for it."""
    caplog.set_level(logging.INFO, logger="tiered_kv")
    results: dict[str, int] = {}
    with contextlib.ExitStack() as stack:
        disk = DiskStore.open(tmp_path / "disk", capacity_bytes=64 * MIB, io_ops=io)
        store = stack.enter_context(disk)
        ns = store.namespace(bytes(32), PAGE_BYTES)
        assert write(ns, range(40)) == 40
        io.answers.clear()
        hung = time.monotonic()
        # Closing waits for what is under way: it must not hang if something below fails.
        stack.callback(io.answers.set)

        def write_and_reuse() -> None:
            memory = bytearray().join(page(seed) for seed in range(50, 60))
            pages = [memoryview(memory)[i * PAGE_BYTES : (i + 1) * PAGE_BYTES] for i in range(10)]
            results.update(write=ns.write_pages([page_hash(s) for s in range(50, 60)], pages))
            memory[:] = bytes(len(memory))

        caught = [
            threading.Thread(target=lambda: results.update(read=read(ns, range(20)))),
            threading.Thread(target=write_and_reuse),
        ]
        for thread in caught:
            thread.start()
        # On a busy machine it is a while until both are caught.
        while io.n_waiting < len(caught):
            time.sleep(0.01)
        began = time.monotonic()
        while time.monotonic() - began < STALL_AFTER_S + 0.3:
            time.sleep(0.05)
        n_refused = 0
        while time.monotonic() - began < STALL_S:
            started = time.monotonic()
            stats = store.stats()
            assert stats.stalled
            assert stats.degraded
            assert ns.contains(page_hash(30))
            assert read(ns, range(30, 40)) == 0
            assert write(ns, range(60, 70)) == 0
            assert time.monotonic() - started < 1.0
            n_refused += 1
            time.sleep(0.05)
        assert n_refused > 5
        assert results == {"write": 0}, "who writes does not wait for a disk that hangs"
        io.answers.set()
        for thread in caught:
            thread.join()
        hung_s = time.monotonic() - hung
        assert results == {"read": 20, "write": 0}
        assert not store.stats().degraded
        assert read(ns, range(30, 40)) == 10, "a miss during a stall drops nothing"
        assert write(ns, range(60, 70)) == 10
        # Its memory was used for other things while the disk hung: damaged is what it may be now,
        # never wrong (`read` compares).
        read(ns, range(50, 60))
        for seed in range(50, 60):
            write(ns, [seed])
            assert read(ns, [seed]) == 1
        assert store.stats().io_errors == 0
    hangs, back = caplog.messages
    assert "does not answer for 2 s" in hangs
    seconds = re.search(r"answers again after (\d+\.\d)", back)
    assert seconds is not None
    assert STALL_S <= float(seconds[1]) <= hung_s + 0.1


def test_stalls_are_told_from_slowness() -> None:
    now = [0.0]
    watch = StallWatch("here", lambda: now[0])
    with watch.watch():
        now[0] = STALL_AFTER_S
        assert not watch.is_stalled()
    for _ in range(100):
        with watch.watch():
            now[0] += 1.0
            assert not watch.is_stalled(), "many I/Os that end are no stall"


def test_the_oldest_io_tells(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    watch = StallWatch("here", lambda: now[0])
    first, second = watch.watch(), watch.watch()
    first.__enter__()
    now[0] = 1.5
    second.__enter__()
    now[0] = 2.5
    assert watch.is_stalled()
    first.__exit__(None, None, None)
    assert not watch.is_stalled()
    now[0] = 4.0
    assert watch.is_stalled()
    second.__exit__(None, None, None)
    assert not watch.is_stalled()
    assert len(caplog.messages) == 4
