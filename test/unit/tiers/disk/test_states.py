"""Whatever state the directory is in, a server starts; what is misuse is refused, in a sentence.

Real file systems that are full or read-only are in test/fault/test_disk_states.py.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from disk_builders import (
    MIB,
    NAMESPACE,
    PAGE_BYTES,
    PATIENCE_S,
    aligned,
    disk_usage,
    filled,
    page_hash,
    page_payload,
    segment_files,
    wait_until,
)

from tiered_kv.core.errors import DiskStateError, DiskTierError
from tiered_kv.tiers.disk import shards as shards_module
from tiered_kv.tiers.disk import store as store_module
from tiered_kv.tiers.disk import tier as tier_module
from tiered_kv.tiers.disk.index import PageIndex
from tiered_kv.tiers.disk.io_ops import IoOps
from tiered_kv.tiers.disk.shards import ShardOpener, shard_path
from tiered_kv.tiers.disk.store import Access, DiskStore
from tiered_kv.tiers.disk.tier import DiskTier, TierNamespace

KEY, OTHER_KEY = bytes(range(32)), bytes(range(1, 33))
OpenTier = Callable[..., DiskTier]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(tier_module, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(tier_module, "LONGEST_PAUSE_S", 0.05)
    monkeypatch.setattr(tier_module, "LOOK_S", 0.05)
    monkeypatch.setattr(shards_module, "JOIN_TIMEOUT_S", 0.3)
    caplog.set_level(logging.INFO, logger="tiered_kv")


@pytest.fixture
def open_tier(directory: Path) -> Iterator[OpenTier]:
    """Opens tiers as the ranks of servers do; what is left open is closed."""
    tiers: list[DiskTier] = []

    def open_one(
        rank: int = 0,
        n_ranks: int = 1,
        *,
        server: str = "a",
        afresh: bool = False,
        key: bytes | None = None,
        io_ops: IoOps | None = None,
        timeout_s: float = PATIENCE_S,
    ) -> DiskTier:
        def open_store(path: Path, access: Access) -> DiskStore:
            return DiskStore.open(
                path, capacity_bytes=64 * MIB, key=key, io_ops=io_ops, access=access
            )

        opener = ShardOpener(directory, rank, n_ranks, server, open_store, afresh=afresh)
        tier = DiskTier.open(opener, str(opener.path), 64 * MIB, timeout_s)
        tiers.append(tier)
        return tier

    yield open_one
    for tier in tiers:
        tier.close(PATIENCE_S)


@pytest.fixture
def written(directory: Path, open_tier: OpenTier) -> Path:
    """The shard of a server that has stored 20 pages and stopped."""
    tier = open_tier()
    assert write(pages_of(tier), range(20)) == 20
    tier.close(PATIENCE_S)
    return shard_path(directory, 0, 1)


def pages_of(tier: DiskTier) -> TierNamespace:
    return tier.namespace(NAMESPACE, PAGE_BYTES, "a model")


def write(ns: TierNamespace, seeds: range) -> int:
    return ns.write_pages([page_hash(s) for s in seeds], [filled(s, PAGE_BYTES) for s in seeds])


def read(ns: TierNamespace, seeds: range) -> int:
    buffers = [aligned(PAGE_BYTES) for _ in seeds]
    n_read = ns.read_pages([page_hash(seed) for seed in seeds], buffers)
    for seed, buffer in zip(seeds[:n_read], buffers, strict=False):
        assert buffer == page_payload(seed, PAGE_BYTES)
    return n_read


def wait_until_mended(tier: DiskTier) -> None:
    wait_until(lambda: not tier.stats().degraded)


class Disk:
    """Lets the index of stores fail as SQLite says it, until it is mended."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.code: int | None = None
        disk = self

        class FailingIndex(PageIndex):
            def _connect(self) -> sqlite3.Connection:
                if disk.code is not None:
                    error = sqlite3.OperationalError("injected")
                    error.sqlite_errorcode = disk.code
                    raise error
                return super()._connect()

        monkeypatch.setattr(store_module, "PageIndex", FailingIndex)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


# -- states


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (sqlite3.SQLITE_FULL, "free some space"),
        (sqlite3.SQLITE_IOERR_SHMSIZE, "free some space"),
        (sqlite3.SQLITE_READONLY, "make the directory writable"),
        (sqlite3.SQLITE_CANTOPEN, "make the directory writable"),
        (sqlite3.SQLITE_IOERR_WRITE, "look into the kernel's log"),
        (sqlite3.SQLITE_IOERR_FSYNC, "look into the kernel's log"),
    ],
)
def test_index_that_cannot_be_written_is_read(
    written: Path,
    open_tier: OpenTier,
    disk: Disk,
    code: int,
    remedy: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.clear()
    disk.code = code
    tier = open_tier()
    ns = pages_of(tier)
    assert tier.stats().degraded
    assert read(ns, range(20)) == 20
    assert write(ns, range(100, 110)) == 0
    assert (written / "index.sqlite").exists(), "it is not taken for damaged"
    (told,) = caplog.messages
    assert remedy in told
    assert "its 20 pages are read, and none are written" in told
    disk.code = None
    wait_until_mended(tier)
    assert write(ns, range(100, 110)) == 10
    assert read(ns, range(20)) == 20
    assert tier.stats().reads == 40, "counters never go back"
    assert len(caplog.messages) == 2
    assert "is in use after" in caplog.messages[1]


def test_clearing_what_is_only_read(written: Path, open_tier: OpenTier, disk: Disk) -> None:
    disk.code = sqlite3.SQLITE_FULL
    tier = open_tier()
    ns = pages_of(tier)
    assert read(ns, range(20)) == 20
    tier.clear()
    assert len(ns) == read(ns, range(20)) == 0
    assert len(pages_of(tier)) == 0
    disk.code = None
    wait_until_mended(tier)
    assert len(ns) == 0
    assert write(ns, range(5)) == read(ns, range(5)) == 5


def test_clearing_what_is_being_opened(written: Path, open_tier: OpenTier) -> None:
    answers = threading.Event()

    class Slow(IoOps):
        def open(self, path: Path, flags: int) -> int:
            assert answers.wait(PATIENCE_S)
            return super().open(path, flags)

    tier = open_tier(io_ops=Slow(), timeout_s=0.1)
    ns = pages_of(tier)
    tier.clear()
    answers.set()
    wait_until_mended(tier)
    assert len(ns) == 0
    assert write(ns, range(5)) == read(ns, range(5)) == 5


def test_nothing_can_be_read_or_written(
    open_tier: OpenTier, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    """A full file system without a tier on it yet: the namespace that was given out comes alive."""
    disk.code = sqlite3.SQLITE_FULL
    tier = open_tier()
    ns = pages_of(tier)
    assert tier.stats().degraded
    assert write(ns, range(5)) == read(ns, range(5)) == len(ns) == 0
    assert not ns.contains(page_hash(0))
    assert ns.count_prefix([page_hash(0)]) == 0
    assert ns.drain_dropped() == []
    time.sleep(0.2)
    (told,) = caplog.messages
    assert "the server runs without it" in told
    disk.code = None
    wait_until_mended(tier)
    assert write(ns, range(5)) == read(ns, range(5)) == 5


@pytest.mark.parametrize("can_be_deleted", [True, False])
def test_eio_on_a_segment_costs_that_segment(
    written: Path, open_tier: OpenTier, can_be_deleted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class BadInode(IoOps):
        def size(self, path: Path) -> int:
            if path.name == "00000000.seg":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().size(path)

    unlink = Path.unlink

    def refuse(path: Path, *, missing_ok: bool = False) -> None:
        if path.suffix == ".seg":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        unlink(path, missing_ok=missing_ok)

    if not can_be_deleted:
        monkeypatch.setattr(Path, "unlink", refuse)
    tier = open_tier(io_ops=BadInode())
    ns = pages_of(tier)
    assert not tier.stats().degraded
    assert len(ns) == 0
    assert write(ns, range(20)) == read(ns, range(20)) == 20


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENOMEM, errno.EACCES, errno.ESTALE])
def test_an_error_that_is_not_the_segments_costs_no_page(
    written: Path, open_tier: OpenTier, code: int
) -> None:
    class Elsewhere(IoOps):
        code: int | None = None

        def size(self, path: Path) -> int:
            if self.code is not None:
                raise OSError(self.code, os.strerror(self.code))
            return super().size(path)

    io_ops = Elsewhere()
    io_ops.code = code
    tier = open_tier(io_ops=io_ops)
    ns = pages_of(tier)
    assert tier.stats().degraded
    assert segment_files(written)
    io_ops.code = None
    wait_until_mended(tier)
    assert read(ns, range(20)) == 20


def test_newer_format(written: Path, open_tier: OpenTier, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever wrote it may come back: it is left alone until somebody says otherwise."""
    contents = json.loads((written / "FORMAT").read_text())
    (written / "FORMAT").write_text(json.dumps({**contents, "version": 99}))
    caplog.clear()
    tier = open_tier()
    ns = pages_of(tier)
    assert tier.stats().degraded
    assert write(ns, range(5)) == read(ns, range(20)) == 0
    (told,) = caplog.messages
    assert "a newer version" in told
    assert "--tiered-kv-clear-disk" in told
    assert segment_files(written)
    tier.clear()
    wait_until_mended(tier)
    assert write(ns, range(5)) == read(ns, range(5)) == 5


@pytest.mark.parametrize("contents", ['{"format": "tiered-kv-disk", "version": 0}', "\x00", None])
def test_format_that_nobody_reads_any_more(
    written: Path, open_tier: OpenTier, contents: str | None
) -> None:
    (written / "FORMAT").unlink()
    if contents is not None:
        (written / "FORMAT").write_text(contents)
    tier = open_tier()
    assert not tier.stats().degraded
    assert write(pages_of(tier), range(5)) == 5


def test_damaged_index(written: Path, open_tier: OpenTier) -> None:
    (written / "index.sqlite").write_bytes(b"nonsense" * 1000)
    tier = open_tier()
    assert not tier.stats().degraded
    assert read(pages_of(tier), range(20)) == 20


def test_damaged_index_that_cannot_be_mended(
    written: Path, open_tier: OpenTier, disk: Disk
) -> None:
    """Neither is read what cannot be trusted, nor thrown away what can be rebuilt."""
    (written / "index.sqlite").write_bytes(b"nonsense" * 1000)
    disk.code = sqlite3.SQLITE_FULL
    tier = open_tier()
    ns = pages_of(tier)
    assert tier.stats().degraded
    assert read(ns, range(20)) == 0
    disk.code = None
    wait_until_mended(tier)
    assert read(ns, range(20)) == 20


def test_directory_that_cannot_be_made(directory: Path, open_tier: OpenTier) -> None:
    directory.parent.mkdir(exist_ok=True)
    directory.symlink_to("/proc/no-such-place")
    tier = open_tier()
    ns = pages_of(tier)
    assert tier.stats().degraded
    directory.unlink()
    wait_until_mended(tier)
    assert write(ns, range(5)) == 5


def test_disk_that_hangs_at_the_start(
    open_tier: OpenTier, caplog: pytest.LogCaptureFixture
) -> None:
    answers = threading.Event()

    class Hanging(IoOps):
        def open(self, path: Path, flags: int) -> int:
            answers.wait(PATIENCE_S)
            return super().open(path, flags)

    tier = open_tier(io_ops=Hanging(), timeout_s=0.1)
    ns = pages_of(tier)
    assert tier.stats().degraded
    assert write(ns, range(5)) == 0
    assert "the server starts without it" in caplog.text
    started = time.monotonic()
    tier.close(0.1)
    assert time.monotonic() - started < 1.0, "stopping does not wait for it either"
    answers.set()


def test_disk_that_answers_late(open_tier: OpenTier) -> None:
    class Slow(IoOps):
        def open(self, path: Path, flags: int) -> int:
            time.sleep(0.3)
            return super().open(path, flags)

    tier = open_tier(io_ops=Slow(), timeout_s=0.1)
    ns = pages_of(tier)
    assert tier.stats().degraded
    wait_until_mended(tier)
    assert write(ns, range(5)) == 5


@pytest.mark.parametrize("what", ["everything", "LOCK", "index.sqlite"])
def test_directory_deleted_under_a_running_server(
    directory: Path, open_tier: OpenTier, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    tier = open_tier()
    ns = pages_of(tier)
    assert write(ns, range(20)) == 20
    shard = shard_path(directory, 0, 1)
    if what == "everything":
        shutil.rmtree(directory)
    else:
        (shard / what).unlink()
    wait_until(lambda: "deleted or replaced by somebody else" in caplog.text)
    wait_until_mended(tier)
    assert ns.drain_dropped() is None, "whoever believes in its pages must ask again"
    write(ns, range(20))
    assert read(ns, range(20)) == 20
    tier.close(PATIENCE_S)
    assert read(pages_of(open_tier()), range(20)) == 20


# -- misuse


def test_in_use_by_another_server(open_tier: OpenTier) -> None:
    first = open_tier()
    with pytest.raises(DiskTierError, match="is in use by process") as caught:
        open_tier(server="b")
    assert not isinstance(caught.value, DiskStateError)
    assert write(pages_of(first), range(5)) == 5
    first.close(PATIENCE_S)
    assert not open_tier(server="b").stats().degraded


def test_in_use_though_the_number_of_ranks_is_another(open_tier: OpenTier) -> None:
    open_tier(0, 1)
    with pytest.raises(DiskTierError, match="is in use by process"):
        open_tier(0, 2, server="b")


@pytest.mark.parametrize(
    ("key", "new_key", "reason"),
    [
        (None, KEY, "are not encrypted but a key was given"),
        (KEY, None, "are encrypted: give the key file"),
        (KEY, OTHER_KEY, "The key is not the one"),
    ],
)
@pytest.mark.parametrize("is_damaged", [False, True])
def test_key_that_changed(
    directory: Path,
    open_tier: OpenTier,
    key: bytes | None,
    new_key: bytes | None,
    reason: str,
    is_damaged: bool,
) -> None:
    """Refused; with leave to delete what is there it begins anew, whatever else is wrong."""
    tier = open_tier(key=key)
    write(pages_of(tier), range(5))
    tier.close(PATIENCE_S)
    with pytest.raises(DiskTierError, match=reason) as caught:
        open_tier(key=new_key)
    assert not isinstance(caught.value, DiskStateError)
    assert "--tiered-kv-clear-disk" in str(caught.value)
    if is_damaged:
        (shard_path(directory, 0, 1) / "index.sqlite").write_bytes(b"nonsense" * 1000)
    tier = open_tier(key=new_key, afresh=True)
    ns = pages_of(tier)
    assert len(ns) == 0
    assert write(ns, range(5)) == 5
    tier.close(PATIENCE_S)
    assert read(pages_of(open_tier(key=new_key)), range(5)) == 5


def test_afresh_for_good_begins_once(written: Path, open_tier: OpenTier, disk: Disk) -> None:
    """What is to be deleted is not read meanwhile, nor what came after deleted again."""
    disk.code = sqlite3.SQLITE_FULL
    tier = open_tier(afresh=True)
    ns = pages_of(tier)
    assert read(ns, range(20)) == 0
    disk.code = None
    wait_until_mended(tier)
    assert write(ns, range(5)) == 5
    shutil.rmtree(written / "segments")
    time.sleep(0.2)
    assert write(ns, range(5)) == read(ns, range(5)) == 5


def test_clear_does_not_touch_what_is_not_ours(directory: Path, open_tier: OpenTier) -> None:
    shard = shard_path(directory, 0, 1)
    shard.mkdir(parents=True)
    (shard / "thesis.txt").write_text("years of work")
    with pytest.raises(DiskTierError, match=r"holds other things \(thesis.txt\)") as caught:
        open_tier(afresh=True)
    assert not isinstance(caught.value, DiskStateError)
    assert (shard / "thesis.txt").read_text() == "years of work"


def test_path_through_a_file(directory: Path, open_tier: OpenTier) -> None:
    directory.parent.mkdir(exist_ok=True)
    directory.write_text("a file")
    with pytest.raises(DiskTierError, match="name another") as caught:
        open_tier()
    assert not isinstance(caught.value, DiskStateError)


# -- other numbers of ranks


def test_shards_of_another_number_of_ranks_are_deleted(
    directory: Path, written: Path, open_tier: OpenTier, caplog: pytest.LogCaptureFixture
) -> None:
    (directory / "notes.txt").write_text("not ours")
    caplog.clear()
    tiers = [open_tier(rank, 2, server="b") for rank in range(2)]
    (told,) = caplog.messages
    assert "deleted shard-0-of-1 (" in told
    assert "--tp-size" in told
    assert sorted(path.name for path in directory.iterdir()) == [
        "notes.txt", "shard-0-of-2", "shard-1-of-2", "tiered-kv.lock",
    ]  # fmt: skip
    for tier in tiers:
        assert write(pages_of(tier), range(5)) == 5
        tier.close(PATIENCE_S)
    assert not written.exists()


def test_a_shard_in_use_is_not_deleted(directory: Path, open_tier: OpenTier) -> None:
    """As by a release that knows no lock on the whole directory."""
    with (
        DiskStore.open(shard_path(directory, 0, 1), capacity_bytes=64 * MIB),
        pytest.raises(DiskTierError, match="shard-0-of-1 is in use by process"),
    ):
        open_tier(0, 2)
    assert not open_tier(0, 2).stats().degraded


def test_a_directory_of_an_earlier_release_is_used(directory: Path, open_tier: OpenTier) -> None:
    """It has shards and no lock of its own."""
    with DiskStore.open(shard_path(directory, 0, 1), capacity_bytes=64 * MIB) as store:
        ns = store.namespace(NAMESPACE, PAGE_BYTES)
        ns.write_pages([page_hash(1)], [filled(1, PAGE_BYTES)])
    assert read(pages_of(open_tier()), range(1, 2)) == 1


def test_ranks_come_and_go_in_any_order(directory: Path, open_tier: OpenTier) -> None:
    """The directory is the server's for as long as one of its ranks lives."""
    results: dict[int, DiskTier] = {}
    threads = [
        threading.Thread(target=lambda rank=rank: results.update({rank: open_tier(rank, 4)}))
        for rank in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert not any(tier.stats().degraded for tier in results.values())
    for rank in (0, 2, 3):
        results[rank].close(PATIENCE_S)
        with pytest.raises(DiskTierError, match="is in use by process"):
            open_tier(0, 4, server="b")
    results[1].close(PATIENCE_S)
    open_tier(0, 4, server="b")


def test_capacity_is_kept(written: Path, directory: Path, open_tier: OpenTier) -> None:
    """What a server with another number of ranks left does not come on top."""
    tier = open_tier(0, 2, server="b")
    write(pages_of(tier), range(1000))
    assert disk_usage(directory) <= 64 * MIB + 8192
