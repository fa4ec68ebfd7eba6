"""Reading an index that cannot be written: a full or read-only file system, or a copy of one."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tiered_kv.tiers.disk.index import INDEX_NAME, PageIndex, index_files


class FrozenIndex(PageIndex):
    """An index that is read, but neither created nor changed: whoever writes gets sqlite3.Error."""

    def __init__(self, directory: Path) -> None:
        """Raises sqlite3.Error if there is none, or it cannot be read."""
        self._connection = contextlib.ExitStack()
        super().__init__(directory, wal_blocks=0, sync_commits=False)

    def _connect(self) -> sqlite3.Connection:
        return self._connection.enter_context(readable_copy(self.directory))

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        raise sqlite3.OperationalError("the index cannot be written")
        yield self._db

    def start_afresh(self) -> Path | None:
        raise sqlite3.OperationalError("the index cannot be written")

    def is_in_place(self) -> bool:
        return True

    def close(self) -> None:
        self._connection.close()


@contextlib.contextmanager
def readable_copy(directory: Path) -> Iterator[sqlite3.Connection]:
    """The index of a directory that nobody has open, as far as it can be read without writing.

    SQLite wants to write a file beside it in order to read one that it closed well, let alone one
    that it has to replay a log into; where it cannot, this does without. Raises sqlite3.Error, or
    OSError where a copy is needed and there is no room for it.
    """
    index, log, _ = index_files(directory)
    uri = index.absolute().as_uri()
    with contextlib.ExitStack() as stack:
        if not log.exists() or log.stat().st_size == 0:
            db = _read(f"{uri}?immutable=1")
        else:
            try:
                # Alone with the file, SQLite keeps in memory what it would share with others.
                db = _read(f"{uri}?mode=rw", "PRAGMA locking_mode=EXCLUSIVE")
            except sqlite3.Error:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tiered-kv-index-"))
                for path in (index, log):
                    shutil.copyfile(path, Path(folder) / path.name)
                db = _read((Path(folder) / INDEX_NAME).as_uri())
        stack.callback(db.close)
        yield db


def _read(uri: str, *pragmas: str) -> sqlite3.Connection:
    db = sqlite3.connect(uri, uri=True, check_same_thread=False, isolation_level=None)
    try:
        for pragma in pragmas:
            db.execute(pragma)
        # What is wrong with the file shows only when it is looked at.
        db.execute("SELECT count(*) FROM meta").fetchone()
    except sqlite3.Error:
        db.close()
        raise
    return db
