"""Whatever state the directory is in, a server starts; what is misuse is refused, in a sentence.

Real file systems that are full or read-only are in test/fault/test_disk_states.py.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from disk_builders import (
    PATIENCE_S,
    page_hash,
    segment_files,
    wait_until,
)
from tier_builders import Disk, OpenTier, pages_of, read, wait_until_mended, write

from tiered_kv.tiers.disk import store as store_module
from tiered_kv.tiers.disk import tier as tier_module
from tiered_kv.tiers.disk.index import PageIndex
from tiered_kv.tiers.disk.io_ops import IoOps
from tiered_kv.tiers.disk.shards import shard_path

KEY, OTHER_KEY = bytes(range(32)), bytes(range(1, 33))


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
    written_shard: Path,
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
    assert (written_shard / "index.sqlite").exists(), "it is not taken for damaged"
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


def test_clearing_what_is_only_read(written_shard: Path, open_tier: OpenTier, disk: Disk) -> None:
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


def test_clearing_again_and_again_makes_no_pause_longer(
    written_shard: Path, open_tier: OpenTier, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that was full for a moment, in which it was cleared ten times, isn't left alone for a
    minute."""
    monkeypatch.setattr(tier_module, "LONGEST_PAUSE_S", 60.0)
    disk.code = sqlite3.SQLITE_FULL
    tier = open_tier()
    for _ in range(12):
        tier.clear()
        wait_until(lambda: not tier._wake.is_set())
    disk.code = None
    wait_until_mended(tier)
    assert write(pages_of(tier), range(5)) == 5


def test_clearing_what_is_being_opened(written_shard: Path, open_tier: OpenTier) -> None:
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
    written_shard: Path, open_tier: OpenTier, can_be_deleted: bool, monkeypatch: pytest.MonkeyPatch
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
    written_shard: Path, open_tier: OpenTier, code: int
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
    assert segment_files(written_shard)
    io_ops.code = None
    wait_until_mended(tier)
    assert read(ns, range(20)) == 20


def test_newer_format(
    written_shard: Path, open_tier: OpenTier, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever wrote it may come back: it is left alone until somebody says otherwise."""
    contents = json.loads((written_shard / "FORMAT").read_text())
    (written_shard / "FORMAT").write_text(json.dumps({**contents, "version": 99}))
    caplog.clear()
    tier = open_tier()
    ns = pages_of(tier)
    assert tier.stats().degraded
    assert write(ns, range(5)) == read(ns, range(20)) == 0
    (told,) = caplog.messages
    assert "a newer version" in told
    assert "--tiered-kv-clear-disk" in told
    assert segment_files(written_shard)
    tier.clear()
    wait_until_mended(tier)
    assert write(ns, range(5)) == read(ns, range(5)) == 5


@pytest.mark.parametrize("contents", ['{"format": "tiered-kv-disk", "version": 0}', "\x00", None])
def test_format_that_nobody_reads_any_more(
    written_shard: Path, open_tier: OpenTier, contents: str | None
) -> None:
    (written_shard / "FORMAT").unlink()
    if contents is not None:
        (written_shard / "FORMAT").write_text(contents)
    tier = open_tier()
    assert not tier.stats().degraded
    assert write(pages_of(tier), range(5)) == 5


def test_eio_on_the_index(
    written_shard: Path,
    open_tier: OpenTier,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its bad blocks are its own: the segments have everything that was in it."""
    bad_inode = (written_shard / "index.sqlite").stat().st_ino

    class BadBlocks(PageIndex):
        def _connect(self) -> sqlite3.Connection:
            path = self.directory / "index.sqlite"
            if path.exists() and path.stat().st_ino == bad_inode:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super()._connect()

    monkeypatch.setattr(store_module, "PageIndex", BadBlocks)
    tier = open_tier()
    assert not tier.stats().degraded
    assert read(pages_of(tier), range(20)) == 20
    assert "rebuilding it from the segment files" in caplog.text


def test_eio_on_the_folder_of_segments(
    written_shard: Path, open_tier: OpenTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says nothing of the index, nor of any page."""
    iterdir = Path.iterdir
    is_bad = True

    def refuse(path: Path) -> Iterator[Path]:
        if is_bad and path.name == "segments":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    tier = open_tier()
    assert tier.stats().degraded
    is_bad = False
    wait_until_mended(tier)
    assert not (written_shard / "index.sqlite.corrupt").exists()
    assert read(pages_of(tier), range(20)) == 20


def test_damaged_index(written_shard: Path, open_tier: OpenTier) -> None:
    (written_shard / "index.sqlite").write_bytes(b"nonsense" * 1000)
    tier = open_tier()
    assert not tier.stats().degraded
    assert read(pages_of(tier), range(20)) == 20


def test_damaged_index_that_cannot_be_mended(
    written_shard: Path, open_tier: OpenTier, disk: Disk
) -> None:
    """Neither is read what cannot be trusted, nor thrown away what can be rebuilt."""
    (written_shard / "index.sqlite").write_bytes(b"nonsense" * 1000)
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
