"""The directory that a server is given: one lock for all its ranks, a shard for each."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tiered_kv.core.units import format_bytes
from tiered_kv.tiers.disk.directory import (
    OwnerLock,
    describe_process,
    erase,
    in_use,
    open_error,
    prepare_directory,
    read_owner,
)
from tiered_kv.tiers.disk.io_ops import FILE_MODE
from tiered_kv.tiers.disk.store import Access, DiskStore

logger = logging.getLogger(__name__)

SERVER_LOCK_NAME = "tiered-kv.lock"
JOIN_TIMEOUT_S = 2.0
"""How long it may take until it is clear whose the directory is."""
_CONTENTS_BYTES = 512
_PROBE_BYTES = 256 << 10
_SHARD = re.compile(r"shard-(\d+)-of-(\d+)")


class Shard(NamedTuple):
    """One rank's directory below the server's."""

    path: Path
    rank: int
    n_shards: int


def shard_path(directory: Path, rank: int, n_shards: int) -> Path:
    return directory / f"shard-{rank}-of-{n_shards}"


def list_shards(directory: Path) -> list[Shard]:
    """Every shard below the server's directory, whatever server it belongs to. Raises OSError."""
    shards = []
    for path in directory.iterdir():
        if (match := _SHARD.fullmatch(path.name)) is not None and path.is_dir():
            shards.append(Shard(path, int(match[1]), int(match[2])))
    return sorted(shards, key=lambda shard: (shard.n_shards, shard.rank))


class ServerLock:
    """The directory is this server's: held by each of its ranks, for as long as any of them lives.

    The first rank to come holds it alone for a moment, to write into it whose it is.
    """

    def __init__(self, directory: Path, n_shards: int, server: str) -> None:
        """server: what all ranks of this server agree on, and no other server has.

        Raises DiskTierError if another server has the directory, OSError.
        """
        self.is_first = False
        """Did this rank come first?"""
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / SERVER_LOCK_NAME
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
        try:
            self._acquire(n_shards, server)
        except BaseException:
            os.close(self._fd)
            raise

    def _acquire(self, n_shards: int, server: str) -> None:
        deadline = time.monotonic() + JOIN_TIMEOUT_S
        while True:
            if _try_lock(self._fd, fcntl.LOCK_EX):
                if _server_of(self._directory) != server:
                    self.is_first = True
                    self._write({**describe_process(), "server": server, "shards": n_shards})
                fcntl.flock(self._fd, fcntl.LOCK_SH)
                return
            if _try_lock(self._fd, fcntl.LOCK_SH):
                if _server_of(self._directory) == server:
                    return
                fcntl.flock(self._fd, fcntl.LOCK_UN)
            # Who holds it may have come a moment ago, and be about to write who he is.
            if time.monotonic() > deadline:
                raise in_use(self._directory, read_owner(self._directory, SERVER_LOCK_NAME))
            time.sleep(0.02)

    def _write(self, contents: dict[str, object]) -> None:
        # In place and of one length: that works where the file system is full.
        text = json.dumps(contents).ljust(_CONTENTS_BYTES - 1) + "\n"
        try:
            os.pwrite(self._fd, text.encode(), 0)
        except OSError:
            # With a single rank nobody has to read it.
            if contents["shards"] != 1:
                raise

    def release(self) -> None:
        os.close(self._fd)


def _try_lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        return False
    return True


def _server_of(directory: Path) -> str | None:
    try:
        return str(json.loads((directory / SERVER_LOCK_NAME).read_text())["server"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def shards_in_use(directory: Path) -> int | None:
    """Of how many shards the server was that had the directory last; None if that isn't known."""
    try:
        return int(json.loads((directory / SERVER_LOCK_NAME).read_text())["shards"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def kept_from_servers(directory: Path) -> Iterator[None]:
    """While it lasts no server can start on the directory.

    Raises DiskTierError if one has it, OSError.
    """
    try:
        fd = os.open(directory / SERVER_LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield
        return
    try:
        if not _try_lock(fd, fcntl.LOCK_EX):
            raise in_use(directory, read_owner(directory, SERVER_LOCK_NAME))
        yield
    finally:
        os.close(fd)


def delete_other_layouts(directory: Path, n_shards: int) -> None:
    """Delete the shards of any other number of ranks, with one line in the log.

    Raises DiskTierError if one of them is in use.
    """
    names: list[str] = []
    n_bytes = 0
    for shard in list_shards(directory):
        if shard.n_shards == n_shards:
            continue
        try:
            n_bytes += _delete_shard(shard.path)
            names.append(shard.path.name)
        except OSError as error:
            logger.warning("Disk tier: %s cannot be deleted (%s).", shard.path, error)
    if names:
        logger.warning(
            "Disk tier %s: deleted %s (%s), left by a server with another --tp-size or --dp-size.",
            directory,
            ", ".join(names),
            format_bytes(n_bytes),
        )


def _delete_shard(path: Path) -> int:
    prepare_directory(path, read_only=True)  # Raises DiskTierError if it isn't ours.
    n_bytes = bytes_below(path)
    lock = OwnerLock(path)
    try:
        erase(path)
        for name in ("segments", "LOCK"):
            child = path / name
            if child.is_dir():
                child.rmdir()
            else:
                child.unlink(missing_ok=True)
        path.rmdir()
    finally:
        lock.release()
    return n_bytes


def bytes_below(directory: Path) -> int:
    """What the files below a directory take on disk. Raises OSError."""
    n_bytes = 0
    for path in directory.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            n_bytes += path.lstat().st_blocks * 512
    return n_bytes


class ShardOpener:
    """Opens a rank's shard, again and again if need be, as long as the directory is the server's.

    open_store: opens a store in the given directory.
    """

    def __init__(
        self,
        directory: Path,
        rank: int,
        n_shards: int,
        server: str,
        open_store: Callable[[Path, Access], DiskStore],
        *,
        afresh: bool = False,
    ) -> None:
        """server: as for ServerLock. afresh: begin by deleting what the shard holds."""
        self.path = shard_path(directory, rank, n_shards)
        self._directory = directory
        self._n_shards = n_shards
        self._server = server
        self._open_store = open_store
        self._afresh = afresh
        self._lock: ServerLock | None = None

    def open(self) -> DiskStore:
        """Raises DiskStateError if the disk is at fault, any other DiskTierError for misuse."""
        try:
            self._own()
        except OSError as error:
            raise open_error(self._directory, error) from error
        if not self._afresh:
            return self._open_store(self.path, Access.NORMAL)
        store = self._open_store(self.path, Access.AFRESH)
        self._afresh = False
        return store

    def open_read_only(self) -> DiskStore | None:
        """For when `open` found the disk at fault; None if nothing here is to be read.

        Raises DiskTierError.
        """
        if self._afresh:
            return None
        # Where the lock cannot be had either, nobody can be writing here.
        with contextlib.suppress(OSError):
            self._own()
        return self._open_store(self.path, Access.READ_ONLY)

    def can_write(self) -> bool:
        """Is there room, and leave to write? Tries it."""
        try:
            with tempfile.TemporaryFile(dir=self.path) as file:
                file.write(bytes(_PROBE_BYTES))
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            return False
        return True

    def begin_anew(self) -> None:
        """The next `open` deletes what is there."""
        self._afresh = True

    def release(self) -> None:
        """After the last store is closed."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _own(self) -> None:
        if self._lock is None:
            self._lock = ServerLock(self._directory, self._n_shards, self._server)
            if self._lock.is_first:
                delete_other_layouts(self._directory, self._n_shards)
