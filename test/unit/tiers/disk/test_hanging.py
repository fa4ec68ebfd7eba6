"""A disk that hangs: who writes leaves, what was not begun is not written, and closing ends."""

from __future__ import annotations

import errno
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from disk_builders import (
    MIB,
    NAMESPACE,
    PAGE_BYTES,
    PATIENCE_S,
    aligned,
    page_hash,
    page_payload,
    read,
    wait_until,
    write,
)

from tiered_kv.tiers.disk import stall_watch
from tiered_kv.tiers.disk.io_ops import IoOps
from tiered_kv.tiers.disk.io_path import IoMode
from tiered_kv.tiers.disk.namespace import DiskNamespace
from tiered_kv.tiers.disk.store import DiskStore

OpenStore = Callable[..., DiskStore]
GIB = 1 << 30


class HangingIo(IoOps):
    """Calls of the kinds in `hang` wait until the disk answers."""

    def __init__(self) -> None:
        self.hang: set[str] = set()
        self.answers = threading.Event()
        self.begun = threading.Event()
        self.n_writes = 0

    def _wait(self, kind: str) -> None:
        if kind in self.hang:
            self.begun.set()
            assert self.answers.wait(PATIENCE_S)

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self._wait("preadv")
        return super().preadv(fd, buffers, offset)

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self._wait("pwritev")
        self.n_writes += 1
        return super().pwritev(fd, buffers, offset)

    def allocate(self, fd: int, n_bytes: int) -> None:
        self._wait("allocate")
        super().allocate(fd, n_bytes)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stall_watch, "STALL_AFTER_S", 0.3)


@pytest.fixture
def io() -> Iterator[HangingIo]:
    io = HangingIo()
    yield io
    io.answers.set()


@pytest.fixture(params=[None, bytes(range(32))], ids=["plain", "encrypted"])
def store(request: pytest.FixtureRequest, open_store: OpenStore, io: HangingIo) -> DiskStore:
    # Segments so large that one call to write takes several I/Os, one at a time.
    return open_store(
        io_ops=io, io_threads=1, io_mode=IoMode.BUFFERED, key=request.param, capacity_bytes=GIB
    )


@pytest.fixture
def ns(store: DiskStore) -> DiskNamespace:
    return store.namespace(NAMESPACE, PAGE_BYTES)


def test_what_was_not_begun_is_never_written_from_buffers_used_again(
    store: DiskStore, ns: DiskNamespace, io: HangingIo, open_store: OpenStore
) -> None:
    """Neither now, nor found in a segment when the index is lost: its checksum would be right, and
    the page another one's."""
    seeds = range(300)
    memory = aligned(len(seeds) * PAGE_BYTES)
    pages = [memory[i * PAGE_BYTES : (i + 1) * PAGE_BYTES] for i in range(len(seeds))]
    for page, seed in zip(pages, seeds, strict=True):
        page[:] = page_payload(seed, PAGE_BYTES)
    assert write(ns, [999]) == 1
    io.hang = {"pwritev"}
    n_writes = io.n_writes
    started = time.monotonic()
    assert ns.write_pages([page_hash(seed) for seed in seeds], pages) == 0
    assert time.monotonic() - started < 2.0
    memory[:] = b"\xee" * len(memory)
    io.answers.set()
    wait_until(lambda: store._operations._under_way == 0)
    assert io.n_writes - n_writes <= 2, "only what had a checksum already"
    present = [seed for seed in seeds if ns.contains(page_hash(seed))]
    for seed in present:
        read(ns, [seed])  # compares
    store.close()
    (store.directory / "index.sqlite").write_bytes(b"nonsense" * 1000)
    key = bytes(range(32)) if store._is_encrypted else None
    reopened = open_store(key=key, capacity_bytes=GIB).namespace(NAMESPACE, PAGE_BYTES)
    for seed in seeds:
        read(reopened, [seed])


@pytest.mark.parametrize("kind", ["allocate", "pwritev"])
def test_a_write_leaves_wherever_it_hangs(
    store: DiskStore, ns: DiskNamespace, io: HangingIo, kind: str
) -> None:
    io.hang = {kind}
    started = time.monotonic()
    assert write(ns, range(5)) == 0
    assert write(ns, range(5)) == 0, "and the next does not even begin"
    assert time.monotonic() - started < 2.0
    assert store.stats().stalled
    io.answers.set()
    wait_until(lambda: not store.stats().stalled)
    wait_until(lambda: write(ns, range(5)) == 5 or len(ns) == 5)
    assert read(ns, range(5)) == 5


def test_a_write_leaves_when_the_index_hangs(store: DiskStore, ns: DiskNamespace) -> None:
    assert write(ns, range(5)) == 5
    answers = threading.Event()
    index = store._index
    put_runs = type(index).put_runs

    def hanging(*rows: object) -> None:
        with index.transaction():
            assert answers.wait(PATIENCE_S)
        put_runs(index, *rows)  # type: ignore[arg-type]

    index.put_runs = hanging  # type: ignore[method-assign]
    started = time.monotonic()
    assert write(ns, range(5, 10)) == 0
    assert time.monotonic() - started < 2.0
    answers.set()
    wait_until(lambda: len(ns) == 10)
    assert read(ns, range(10)) == 10


def test_closing_has_one_deadline(
    store: DiskStore, ns: DiskNamespace, io: HangingIo, caplog: pytest.LogCaptureFixture
) -> None:
    write(ns, range(5))
    io.hang = {"preadv", "pwritev"}
    caught = [
        threading.Thread(target=lambda: read(ns, range(5))),
        threading.Thread(target=lambda: write(ns, range(10, 15))),
    ]
    for thread in caught:
        thread.start()
    assert io.begun.wait(PATIENCE_S)
    started = time.monotonic()
    assert not store.close(0.2)
    assert 0.1 < time.monotonic() - started < 1.0
    assert "cannot be closed" in caplog.text
    assert read(ns, range(5)) == write(ns, range(20, 25)) == 0
    io.answers.set()
    for thread in caught:
        thread.join()
    assert store.close()


def test_a_trial_that_hangs_neither_opens_the_gate_nor_keeps_it_shut(
    store: DiskStore, ns: DiskNamespace, io: HangingIo
) -> None:
    """A write that was to tell whether the disk works again is left by its caller, and ends with
    nothing written: the next one tells, at once."""
    store._gate.shut(OSError(errno.ENOSPC, "full"))
    store._gate._retry_at = 0.0
    io.hang = {"pwritev"}
    assert write(ns, range(300)) == 0
    assert store.stats().stalled
    io.answers.set()
    wait_until(lambda: store._operations._under_way == 0 and not store.stats().stalled)
    assert store.stats().degraded != bool(len(ns))
    io.hang = set()
    seeds = range(1000, 1010)
    assert write(ns, seeds) == 10
    assert not store.stats().degraded
    assert read(ns, seeds) == 10


@pytest.mark.parametrize("hangs", ["pread", "pwritev"])
def test_a_process_ends_though_its_disk_hangs(tmp_path: Path, hangs: str) -> None:
    """In a write, or while an index is rebuilt."""
    program = """
        import os, sys, threading
        from pathlib import Path
        from tiered_kv.tiers.disk import stall_watch
        from tiered_kv.tiers.disk.io_ops import IoOps
        from tiered_kv.tiers.disk.store import DiskStore

        stall_watch.STALL_AFTER_S = 0.3

        class Hanging(IoOps):
            def pwritev(self, fd, buffers, offset):
                if len(buffers) > 1:
                    threading.Event().wait()
                return super().pwritev(fd, buffers, offset)

        if sys.argv[2] == "pread":
            def open_store():
                return DiskStore.open(Path(sys.argv[1]), capacity_bytes=1 << 26)

            with open_store() as store:
                ns = store.namespace(bytes(32), 4096)
                ns.write_pages([bytes(32)], [memoryview(bytes(4096))])
            Path(sys.argv[1], "index.sqlite").unlink()
            hung = threading.Event()
            os.pread = lambda *_: hung.set() or threading.Event().wait()
            threading.Thread(target=open_store, daemon=True).start()
            assert hung.wait(10)
            print("closed")
            sys.exit()

        store = DiskStore.open(Path(sys.argv[1]), capacity_bytes=1 << 26, io_ops=Hanging())
        ns = store.namespace(bytes(32), 1 << 20)
        hashes = [bytes([i]) * 32 for i in range(16)]
        assert ns.write_pages(hashes, [memoryview(bytes(1 << 20))] * 16) == 0
        store.close(0.1)
        print("closed")
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "disk"), hangs],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "closed\n"


def test_capacity_is_not_lost_to_a_stall(open_store: OpenStore, io: HangingIo) -> None:
    """Slots that hung are free again once the disk has answered."""
    store = open_store(io_ops=io, capacity_bytes=8 * MIB)
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    write(ns, range(5))
    for seed in range(100, 103):
        io.hang = {"pwritev"}
        io.answers.clear()
        write(ns, [seed])
        io.answers.set()
        wait_until(lambda: store._operations._under_way == 0)
    io.hang = set()
    for seed in range(1000, 1300):
        assert write(ns, [seed]) == 1
    assert not any(segment.writers for segment in store._catalog.segments.values())
