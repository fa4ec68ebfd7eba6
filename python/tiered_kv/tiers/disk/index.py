"""The persistent index: which page is in which slot, in SQLite (WAL, synchronous=NORMAL).

A commit of rows is what acknowledges pages. Rows are keyed by location, so a reused slot replaces
its old row, pages written together are neighbours in the B-tree, and dropping a segment is one
range delete. Lookups never come here: the catalog's dicts are in front.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tiered_kv.tiers.disk.io_ops import FILE_MODE
from tiered_kv.tiers.disk.record import checksum
from tiered_kv.tiers.disk.segment import location

INDEX_NAME = "index.sqlite"
CORRUPT_INDEX_NAME = "index.sqlite.corrupt"
_SUFFIXES = ("", "-wal", "-shm")
_FETCH_ROWS = 8_192

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS namespaces (
    number INTEGER PRIMARY KEY, id BLOB UNIQUE NOT NULL, page_bytes INTEGER NOT NULL,
    description TEXT NOT NULL, checksum BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS segments (
    number INTEGER PRIMARY KEY, record_bytes INTEGER NOT NULL, slots INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS pages (
    location INTEGER PRIMARY KEY, namespace INTEGER NOT NULL, page_hash BLOB NOT NULL,
    access INTEGER NOT NULL);
"""
_PUT_PAGE = "INSERT OR REPLACE INTO pages VALUES (?, ?, ?, ?)"


class PageRow(NamedTuple):
    """One stored page; `access` as in `Segment.access`."""

    location: int
    namespace: int
    page_hash: bytes
    access: int


class NamespaceRow(NamedTuple):
    number: int
    namespace_id: bytes
    page_bytes: int
    description: str


class SegmentRow(NamedTuple):
    number: int
    record_bytes: int
    slots: int


def index_files(directory: Path) -> list[Path]:
    """The files SQLite keeps for the index, whether or not they exist now."""
    return [directory / f"{INDEX_NAME}{suffix}" for suffix in _SUFFIXES]


def set_index_aside(directory: Path, has_room: Callable[[int], bool]) -> Path | None:
    """Rename a damaged index, replacing one set aside earlier; returns where it is now.

    None if it was deleted instead, because `has_room` said of its size that it would not fit.
    """
    index, *logs = index_files(directory)
    aside = directory / CORRUPT_INDEX_NAME
    aside.unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        if has_room(index.stat().st_size):
            index.replace(aside)
        index.unlink(missing_ok=True)
    for log in logs:
        log.unlink(missing_ok=True)
    return aside if aside.exists() else None


def size_of_aside(directory: Path) -> int:
    """Bytes of a damaged index kept for inspection."""
    try:
        return (directory / CORRUPT_INDEX_NAME).stat().st_size
    except FileNotFoundError:
        return 0


def stored_meta(db: sqlite3.Connection, name: str) -> int | None:
    """A number remembered under `name`."""
    row = db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
    return None if row is None else int(row[0])


def _row_checksum(row: NamespaceRow) -> bytes:
    return checksum(repr(tuple(row)).encode())


class PageIndex:
    """One connection, used by many threads one at a time. Methods raise sqlite3.Error."""

    def __init__(
        self,
        directory: Path,
        *,
        wal_blocks: int,
        sync_commits: bool,
        has_room: Callable[[int], bool] = lambda _: True,
        watch: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
    ) -> None:
        """Open or create. `wal_blocks`: 4 KiB blocks in the write-ahead log before a checkpoint;
        `has_room`: may a damaged index of this size be kept for inspection? `watch` is entered
        around what waits for the disk."""
        self._watch = watch
        self._has_room = has_room
        self.directory = directory
        self.lock = threading.RLock()
        self._wal_blocks = wal_blocks
        self._sync_commits = sync_commits
        self._db = self._connect()

    def _connect(self) -> sqlite3.Connection:
        path = self.directory / INDEX_NAME
        # Created by us so that SQLite's files (the log inherits the mode) are private.
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
        self._stat = os.fstat(fd)
        os.close(fd)
        db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        try:
            db.execute("PRAGMA auto_vacuum=INCREMENTAL")
            db.execute("PRAGMA journal_mode=WAL")
            db.execute(f"PRAGMA synchronous={'FULL' if self._sync_commits else 'NORMAL'}")
            db.execute(f"PRAGMA wal_autocheckpoint={self._wal_blocks}")
            db.execute(f"PRAGMA journal_size_limit={self._wal_blocks * 4096}")
            db.executescript(_SCHEMA)
        except sqlite3.Error:
            db.close()
            raise
        return db

    def is_in_place(self) -> bool:
        """False if the file has been deleted, or replaced by another. Raises OSError."""
        try:
            return os.path.samestat((self.directory / INDEX_NAME).stat(), self._stat)
        except FileNotFoundError:
            return False

    def start_afresh(self) -> Path | None:
        """Set the index's file aside and go on with an empty one; returns where the old one is."""
        with self.lock:
            self._db.close()
            aside = set_index_aside(self.directory, self._has_room)
            self._db = self._connect()
            return aside

    def close(self) -> None:
        with self.lock:
            self._db.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing; the changes are acknowledged when the block ends."""
        with self.lock, self._watch():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                # After some errors SQLite has already rolled back by itself.
                with contextlib.suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                raise

    # -- reading, at open

    def check(self) -> None:
        """Raises sqlite3.DatabaseError if the file's structure is damaged anywhere."""
        (verdict,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(str(verdict).splitlines()[-1])

    def namespaces(self) -> list[NamespaceRow]:
        """Raises ValueError if a row is damaged: a wrong page size would lock its owner out."""
        rows = []
        for *values, digest in self._db.execute("SELECT * FROM namespaces"):
            row = NamespaceRow(*values)
            if digest != _row_checksum(row):
                raise ValueError(f"namespace {row.number} fails its checksum")
            rows.append(row)
        return rows

    def segments(self) -> list[SegmentRow]:
        rows = self._db.execute("SELECT * FROM segments ORDER BY number")
        return [SegmentRow(*row) for row in rows]

    def page_batches(self) -> Iterator[list[tuple[int, int, bytes, int]]]:
        """Every page as (location, namespace, hash, access), in order of location, in batches."""
        cursor = self._db.execute("SELECT * FROM pages ORDER BY location")
        while rows := cursor.fetchmany(_FETCH_ROWS):
            yield rows

    def meta(self, name: str) -> int | None:
        return stored_meta(self._db, name)

    # -- writing

    def set_meta(self, name: str, value: int) -> None:
        with self.transaction() as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))

    def put_namespace(self, row: NamespaceRow) -> None:
        with self.transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO namespaces VALUES (?, ?, ?, ?, ?)",
                (*row, _row_checksum(row)),
            )

    def put_segment(self, row: SegmentRow) -> None:
        with self.transaction() as db:
            db.execute("INSERT OR REPLACE INTO segments VALUES (?, ?, ?)", row)

    def put_pages(self, rows: Sequence[PageRow]) -> None:
        with self.transaction() as db:
            db.executemany(_PUT_PAGE, rows)

    def replace_segment(self, number: int, moved: Sequence[PageRow], *, forget: bool) -> None:
        """In one step: `moved` live elsewhere now, and segment `number` holds no page.

        `forget` also removes the segment itself (its file is about to be deleted).
        """
        with self.transaction() as db:
            db.executemany(_PUT_PAGE, moved)
            db.execute(
                "DELETE FROM pages WHERE location BETWEEN ? AND ?",
                (location(number, 0), location(number + 1, 0) - 1),
            )
            if forget:
                db.execute("DELETE FROM segments WHERE number = ?", (number,))

    def delete_pages(self, pages: Sequence[tuple[int, bytes]]) -> None:
        """Delete (location, page hash) pairs; a slot that holds another page by now is left."""
        with self.transaction() as db:
            db.executemany("DELETE FROM pages WHERE location = ? AND page_hash = ?", pages)

    def save_access(self, rows: Iterable[tuple[int, int]]) -> None:
        """Store (access, location) pairs."""
        with self.transaction() as db:
            db.executemany("UPDATE pages SET access = ? WHERE location = ?", rows)

    def clear(self) -> None:
        """Forget every page and segment; namespaces stay."""
        with self.transaction() as db:
            db.execute("DELETE FROM pages")
            db.execute("DELETE FROM segments")
        self.compact()

    def compact(self) -> None:
        """Give unused blocks of the index file back to the file system."""
        with self.lock:
            self._db.execute("PRAGMA incremental_vacuum").fetchall()
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
