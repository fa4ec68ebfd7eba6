"""An error costs what it is to be blamed on: the page, the open file, or nothing but time."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from disk_builders import (
    MIB,
    NAMESPACE,
    PAGE_BYTES,
    page_hash,
    read,
    readable,
    segment_files,
    write,
)

from tiered_kv.core.errors import DiskStateError
from tiered_kv.tiers.disk import io_ops as io_ops_module
from tiered_kv.tiers.disk import scan
from tiered_kv.tiers.disk.io_ops import IoOps
from tiered_kv.tiers.disk.io_path import IoMode
from tiered_kv.tiers.disk.namespace import DiskNamespace
from tiered_kv.tiers.disk.reader import FAILURE_MEMORY_S
from tiered_kv.tiers.disk.store import DiskStore
from tiered_kv.tiers.disk.write_gate import WriteGate
from tiered_kv.tiers.gate import Admission

OpenStore = Callable[..., DiskStore]
PROCESS = [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EINTR]


class FailingIo(IoOps):
    """Calls of the kinds in `fail` fail with `code`; `n_left` times, if that is set."""

    def __init__(self) -> None:
        self.code: int | None = None
        self.fail = {"preadv", "pwritev"}
        self.n_left: int | None = None
        self.opened: list[tuple[str, int]] = []
        self.direct_fds: set[int] = set()

    def _check(self, kind: str) -> None:
        if self.code is None or kind not in self.fail or self.n_left == 0:
            return
        if self.n_left is not None:
            self.n_left -= 1
        raise OSError(self.code, os.strerror(self.code))

    def open(self, path: Path, flags: int) -> int:
        self._check("open")
        self.opened.append((path.name, flags))
        fd = super().open(path, flags)
        (self.direct_fds.add if flags & os.O_DIRECT else self.direct_fds.discard)(fd)
        return fd

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self._check("preadv")
        if fd in self.direct_fds:
            self._check("direct")
        return super().preadv(fd, buffers, offset)

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self._check("pwritev")
        if fd in self.direct_fds:
            self._check("direct")
        return super().pwritev(fd, buffers, offset)


class Time:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def io() -> FailingIo:
    return FailingIo()


@pytest.fixture
def store(open_store: OpenStore, io: FailingIo) -> DiskStore:
    return open_store(io_ops=io, io_mode=IoMode.BUFFERED)


@pytest.fixture
def ns(store: DiskStore) -> DiskNamespace:
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    assert write(ns, range(20)) == 20
    return ns


@pytest.fixture
def clock(store: DiskStore, monkeypatch: pytest.MonkeyPatch) -> Time:
    clock = Time()
    monkeypatch.setattr(store._gate, "_now", clock)
    monkeypatch.setattr(store._operations.reader, "_now", clock)
    return clock


@pytest.mark.parametrize("code", PROCESS)
def test_errors_of_the_process_cost_no_page(
    store: DiskStore, ns: DiskNamespace, io: FailingIo, clock: Time, code: int
) -> None:
    io.code = code
    for _ in range(5):
        assert read(ns, range(20)) == 0
    assert store.stats().degraded, "writes had better wait, too"
    io.code = None
    assert read(ns, range(20)) == 20
    clock.now_s = 2.0
    assert write(ns, range(50, 55)) == 5
    assert not store.stats().degraded


def test_no_descriptor_left_to_open_a_segment_with(
    open_store: OpenStore, io: FailingIo, store: DiskStore, ns: DiskNamespace
) -> None:
    store.close()
    store = open_store(io_ops=io)
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    io.fail, io.code = {"open"}, errno.EMFILE
    for _ in range(3):
        assert read(ns, range(20)) == 0
    io.code = None
    assert read(ns, range(20)) == 20


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EPERM])
def test_states_cost_no_page(ns: DiskNamespace, io: FailingIo, code: int) -> None:
    io.code = code
    for _ in range(5):
        assert read(ns, range(20)) == 0
    io.code = None
    assert read(ns, range(20)) == 20


@pytest.mark.parametrize("code", [errno.EIO, errno.EUCLEAN, errno.EBADMSG])
def test_two_failures_of_the_medium_cost_the_page(
    ns: DiskNamespace, io: FailingIo, code: int
) -> None:
    io.code = code
    assert read(ns, [3]) == read(ns, [3]) == 0
    io.code = None
    assert readable(ns, range(20)) == [seed for seed in range(20) if seed != 3]


def test_failures_far_apart_cost_nothing(
    store: DiskStore, ns: DiskNamespace, io: FailingIo, clock: Time
) -> None:
    for _ in range(5):
        io.code = errno.EIO
        assert read(ns, [3]) == 0
        clock.now_s += FAILURE_MEMORY_S + 1.0
    io.code = None
    assert read(ns, [3]) == 1


def test_success_forgives(store: DiskStore, ns: DiskNamespace, io: FailingIo) -> None:
    for _ in range(5):
        io.code = errno.EIO
        assert read(ns, [3]) == 0
        io.code = None
        assert read(ns, [3]) == 1
    assert store._operations.reader._failed_at == {}


def test_only_so_many_failures_are_remembered(
    ns: DiskNamespace, io: FailingIo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiered_kv.tiers.disk.reader._REMEMBERED_FAILURES", 5)
    io.code = errno.EIO
    assert read(ns, range(20)) == 0
    reader = ns._operations.reader
    assert len(reader._failed_at) == 5


@pytest.mark.parametrize("what", ["preadv", "pwritev"])
def test_a_stale_handle_is_opened_anew(ns: DiskNamespace, io: FailingIo, what: str) -> None:
    """Once on the way, as after the file server was restarted: nobody notices."""
    io.fail, io.code, io.n_left = {what}, errno.ESTALE, 1
    n_opened = len(io.opened)
    if what == "preadv":
        assert read(ns, range(20)) == 20
    else:
        assert write(ns, range(30, 40)) == 10
    # The keeper may open it in the same moment; one of both is kept.
    assert n_opened + 1 <= len(io.opened) <= n_opened + 2
    io.code = None
    assert readable(ns, range(40)) == [*range(20), *(range(30, 40) if what == "pwritev" else ())]


def test_a_handle_is_exchanged_under_those_who_use_it(
    open_store: OpenStore, ns: DiskNamespace, store: DiskStore
) -> None:
    """Reads go on all the while, and none reads another file by the number of the old one."""
    segment = next(iter(store._catalog.segments.values()))
    stop = threading.Event()
    failures: list[int] = []

    def read_on() -> None:
        while not stop.is_set():
            if read(ns, range(20)) != 20:
                failures.append(1)

    threads = [threading.Thread(target=read_on) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(200):
        store._files.forget(segment.number)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert store.stats().checksum_failures == 0


def test_rebuilding_gives_up_no_segment_that_only_this_process_cannot_open(
    open_store: OpenStore, store: DiskStore, ns: DiskNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.close()
    (store.directory / "index.sqlite").write_bytes(b"nonsense" * 1000)

    def no_descriptors(path: Path) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(scan, "_scan_file", no_descriptors)
        with pytest.raises(DiskStateError, match="ulimit -n"):
            open_store()
    assert segment_files(store.directory)
    assert read(open_store().namespace(NAMESPACE, PAGE_BYTES), range(20)) == 20


def test_rebuilding_skips_bad_blocks_only(
    open_store: OpenStore, store: DiskStore, ns: DiskNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.close()
    (store.directory / "index.sqlite").write_bytes(b"nonsense" * 1000)
    offset = 4096 + 7 * (4096 + PAGE_BYTES)
    pread = os.pread

    def bad_block(fd: int, n_bytes: int, at: int) -> bytes:
        if at == offset:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(fd, n_bytes, at)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", bad_block)
        reopened = open_store()
    ns = reopened.namespace(NAMESPACE, PAGE_BYTES)
    assert readable(ns, range(20)) == [seed for seed in range(20) if seed != 7]


def test_reclaim_gives_up_no_page_for_want_of_descriptors(
    open_store: OpenStore, io: FailingIo
) -> None:
    """Pages that were read lately are carried over, or their segment is not given up yet."""
    store = open_store(io_ops=io, capacity_bytes=8 * MIB, io_mode=IoMode.BUFFERED)
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    seed = 0
    while store.stats().reclaimed_segments == 0:
        write(ns, [seed])
        if seed % 5 == 0:
            read(ns, [seed])
        seed += 1
    kept = len(ns)
    reclaimed = store.stats().reclaimed_segments
    read(ns, [s for s in range(seed) if ns.contains(page_hash(s))][:3])
    io.fail, io.code = {"preadv"}, errno.EMFILE
    for more in range(seed, seed + 40):
        write(ns, [more])
    assert store.stats().reclaimed_segments == reclaimed
    assert store.stats().degraded
    assert len(ns) >= kept


# -- direct I/O that is refused when data moves


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
@pytest.mark.parametrize("mode", [IoMode.AUTO, IoMode.DIRECT])
@pytest.mark.parametrize("key", [None, bytes(range(32))], ids=["plain", "encrypted"])
def test_direct_io_refused_later(
    open_store: OpenStore,
    has_direct_io: bool,
    io: FailingIo,
    code: int,
    mode: IoMode,
    key: bytes | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if not has_direct_io:
        pytest.skip("no direct I/O on this file system")
    store = open_store(io_ops=io, io_mode=mode, key=key)
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    assert write(ns, range(5)) == 5
    io.fail, io.code = {"direct"}, code
    assert write(ns, range(5, 10)) == 5
    assert read(ns, range(10)) == 10
    assert not store.stats().degraded
    assert not store.stats().direct_io
    (told,) = caplog.messages
    assert "refuses direct I/O" in told


def test_a_full_disk_is_not_one_without_direct_io(
    open_store: OpenStore, has_direct_io: bool, io: FailingIo
) -> None:
    """The probe needs a block, and there may be none."""
    if not has_direct_io:
        pytest.skip("no direct I/O on this file system")
    io.code = errno.ENOSPC
    store = open_store(io_ops=io, io_mode=IoMode.DIRECT)
    io.code = None
    assert store.stats().direct_io
    assert write(store.namespace(NAMESPACE, PAGE_BYTES), range(5)) == 5


# -- reserving blocks


class NoFallocate:
    """libc on a file system that cannot reserve; counts what else is called."""

    def __init__(self, code: int) -> None:
        self.code = code

    def fallocate(self, fd: int, mode: int, offset: int, n_bytes: int) -> int:
        ctypes.set_errno(self.code)
        return -1


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_no_file_is_written_full_of_zeros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """glibc's posix_fallocate would write into each of its blocks."""
    monkeypatch.setattr(io_ops_module, "_libc", NoFallocate(code))
    path = tmp_path / "file"
    fd = IoOps().open(path, os.O_RDWR | os.O_CREAT)
    IoOps().allocate(fd, 64 * MIB)
    os.close(fd)
    assert path.stat().st_size == 64 * MIB
    assert path.stat().st_blocks * 512 < MIB


def test_blocks_are_reserved(tmp_path: Path) -> None:
    path = tmp_path / "file"
    fd = IoOps().open(path, os.O_RDWR | os.O_CREAT)
    IoOps().allocate(fd, 2 * MIB)
    os.close(fd)
    assert path.stat().st_size == 2 * MIB
    assert path.stat().st_blocks * 512 >= 2 * MIB


def test_a_full_disk_is_told_when_reserving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(io_ops_module, "_libc", NoFallocate(errno.ENOSPC))
    fd = IoOps().open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    with pytest.raises(OSError, match="No space left"):
        IoOps().allocate(fd, 2 * MIB)
    os.close(fd)


def test_a_gate_that_was_shut_opens_with_a_write() -> None:
    clock = Time()
    gate = WriteGate("here", clock)
    gate.shut(OSError(errno.EMFILE, "many"))
    gate.shut(OSError(errno.EMFILE, "many"))
    assert not gate.try_enter()
    clock.now_s = 1.0
    assert gate.try_enter() is Admission.PROBE
    gate.succeed(Admission.PROBE)
    assert not gate.is_degraded
