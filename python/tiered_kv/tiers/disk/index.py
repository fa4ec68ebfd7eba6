"""The persistent index: which page is in which slot, in SQLite (WAL, synchronous=NORMAL).

A commit of rows is what acknowledges pages. A row is a run of pages in adjacent slots, keyed by the
location of the first, so that a segment's pages are neighbours in the B-tree and are dropped by one
range delete; once a segment is full its rows are packed into as few as possible. So ten million
pages are read in seconds, and mostly by SQLite itself. Lookups never come here: the catalog is in
front.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tiered_kv.tiers.disk.fair_lock import FairLock
from tiered_kv.tiers.disk.io_ops import FILE_MODE
from tiered_kv.tiers.disk.record import ID_BYTES, checksum
from tiered_kv.tiers.disk.segment import ACCESS_BYTES, PageRun, location

INDEX_NAME = "index.sqlite"
CORRUPT_INDEX_NAME = "index.sqlite.corrupt"
_SUFFIXES = ("", "-wal", "-shm")

SCHEMA_VERSION = 2
"""An index of another version is rebuilt from the segments."""
_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS namespaces (
    number INTEGER PRIMARY KEY, id BLOB UNIQUE NOT NULL, page_bytes INTEGER NOT NULL,
    description TEXT NOT NULL, checksum BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS segments (
    number INTEGER PRIMARY KEY, record_bytes INTEGER NOT NULL, slots INTEGER NOT NULL,
    generation INTEGER NOT NULL, newest INTEGER NOT NULL, was_read BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS runs (
    location INTEGER PRIMARY KEY, namespace INTEGER NOT NULL, hashes BLOB NOT NULL,
    accesses BLOB NOT NULL);
PRAGMA user_version={SCHEMA_VERSION};
"""
_PUT_RUN = "INSERT OR REPLACE INTO runs VALUES (?, ?, ?, ?)"
_FORGET_RUNS = "DELETE FROM runs WHERE location BETWEEN ? AND ?"


class NamespaceRow(NamedTuple):
    number: int
    namespace_id: bytes
    page_bytes: int
    description: str


class SegmentRow(NamedTuple):
    number: int
    record_bytes: int
    slots: int
    generation: int
    """How often the store had been cleared when the file was made."""
    newest: int = 0
    was_read: bytes = b""
    """The order of use when it was saved last: see `Segment.recency`."""


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
        self.lock = FairLock()
        self._wal_blocks = wal_blocks
        self._sync_commits = sync_commits
        self.n_bytes = 0
        """What the index takes on disk, its log included."""
        self._db = self._connect()
        self._note_size()

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
            (version,) = db.execute("PRAGMA user_version").fetchone()
            (n_tables,) = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()
            if n_tables and version != SCHEMA_VERSION:
                raise sqlite3.DatabaseError(f"it is of version {version}, not {SCHEMA_VERSION}")
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
            self._note_size()
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
                self._note_size()
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

    def runs(self) -> Iterator[PageRun]:
        """Every page, in order of location. Raises ValueError if a row's values make no sense."""
        for row in self._db.execute("SELECT * FROM runs ORDER BY location"):
            run = PageRun(*row)
            if [type(value) for value in run] != [int, int, bytes, bytes]:
                raise ValueError("a row has values of the wrong type")
            yield run

    def meta(self, name: str) -> int | None:
        return stored_meta(self._db, name)

    # -- writing

    def set_meta(self, name: str, value: int) -> None:
        with self.transaction() as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))

    def put_segment(self, row: SegmentRow) -> None:
        with self.transaction() as db:
            db.execute("INSERT OR REPLACE INTO segments VALUES (?, ?, ?, ?, ?, ?)", row)

    def put_runs(self, runs: Iterable[PageRun], namespaces: Iterable[NamespaceRow] = ()) -> None:
        """Store pages, and first of all what namespaces they are in if that isn't known yet."""
        with self.transaction() as db:
            for row in namespaces:
                _put_namespace(db, row)
            db.executemany(_PUT_RUN, runs)

    def replace_runs(self, number: int, runs: Iterable[PageRun]) -> None:
        """Segment `number` holds these pages and no others."""
        with self.transaction() as db:
            db.execute(_FORGET_RUNS, _locations_of(number))
            db.executemany(_PUT_RUN, runs)

    def forget_segment(self, number: int) -> None:
        """The segment is about to be deleted, with all that is in it."""
        with self.transaction() as db:
            db.execute(_FORGET_RUNS, _locations_of(number))
            db.execute("DELETE FROM segments WHERE number = ?", (number,))

    def forget_namespaces(self, numbers: Iterable[int]) -> None:
        with self.transaction() as db:
            db.executemany("DELETE FROM namespaces WHERE number = ?", [(n,) for n in numbers])

    def delete_pages(self, pages: Sequence[tuple[int, bytes]]) -> None:
        """Delete (location, page hash) pairs; a slot that holds another page by now is left."""
        doomed = dict(pages)
        with self.transaction() as db:
            left = sorted(doomed, reverse=True)
            while left:
                row = db.execute(
                    "SELECT * FROM runs WHERE location <= ? ORDER BY location DESC LIMIT 1",
                    (left[0],),
                ).fetchone()
                run = PageRun(*row) if row else None
                if run is None or left[0] >= run.location + run.n_pages:
                    left.pop(0)
                    continue
                db.execute("DELETE FROM runs WHERE location = ?", (run.location,))
                db.executemany(_PUT_RUN, _without(run, doomed))
                while left and left[0] >= run.location:
                    left.pop(0)

    def save_recency(self, rows: Iterable[tuple[int, bytes, int]]) -> None:
        """Store (newest use, slots that were read, segment number) triples."""
        with self.transaction() as db:
            db.executemany("UPDATE segments SET newest = ?, was_read = ? WHERE number = ?", rows)

    # -- size

    def unused_blocks(self) -> int:
        """Blocks of the index file that hold nothing."""
        with self.lock:
            (count,) = self._db.execute("PRAGMA freelist_count").fetchone()
            return int(count)

    def give_back(self, n_blocks: int) -> None:
        """Move what is at the end of the index file into so many unused blocks, and cut it off.

        The file gets shorter when the log is folded into it, see `fold_log`.
        """
        with self.lock, self._watch():
            # Not `execute`: that steps such a pragma once, and one step frees one block.
            self._db.executescript(f"PRAGMA incremental_vacuum({n_blocks})")

    def fold_log(self) -> None:
        """Bring the index file up to date, and give the log's blocks back."""
        with self.lock, self._watch():
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            self._note_size()

    def _note_size(self) -> None:
        total = 0
        for path in index_files(self.directory):
            with contextlib.suppress(FileNotFoundError):
                total += path.stat().st_size
        self.n_bytes = total


def _put_namespace(db: sqlite3.Connection, row: NamespaceRow) -> None:
    db.execute(
        "INSERT OR REPLACE INTO namespaces VALUES (?, ?, ?, ?, ?)", (*row, _row_checksum(row))
    )


def _locations_of(number: int) -> tuple[int, int]:
    """The first and the last that a segment can have."""
    return location(number, 0), location(number + 1, 0) - 1


def _without(run: PageRun, doomed: dict[int, bytes]) -> list[PageRun]:
    """What is left of a run without the pages that are doomed."""
    kept: list[PageRun] = []
    start = 0
    for n in range(run.n_pages + 1):
        is_end = n == run.n_pages
        if is_end or doomed.get(run.location + n) == run.hashes[n * ID_BYTES : (n + 1) * ID_BYTES]:
            if start < n:
                kept.append(
                    PageRun(
                        run.location + start,
                        run.namespace,
                        run.hashes[start * ID_BYTES : n * ID_BYTES],
                        run.accesses[start * ACCESS_BYTES : n * ACCESS_BYTES],
                    )
                )
            start = n + 1
    return kept
