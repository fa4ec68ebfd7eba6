"""The disk tier's front door: open a directory, take namespaces from it, close it."""

from __future__ import annotations

import contextlib
import enum
import logging
import sqlite3
import threading
from pathlib import Path
from typing import Self

from tiered_kv.core.errors import DiskTierError
from tiered_kv.tiers.disk.budget import Budget
from tiered_kv.tiers.disk.buffers import ScratchPool
from tiered_kv.tiers.disk.catalog import Catalog, NamespaceEntries
from tiered_kv.tiers.disk.directory import (
    OwnerLock,
    erase,
    erase_unreadable,
    open_cipher,
    open_error,
    prepare_directory,
    segments_directory,
)
from tiered_kv.tiers.disk.index import PageIndex, index_files, size_of_aside
from tiered_kv.tiers.disk.io_ops import IoOps
from tiered_kv.tiers.disk.io_path import IoMode, Reuse, choose_path
from tiered_kv.tiers.disk.io_pool import IoPool
from tiered_kv.tiers.disk.loading import open_frozen_index, open_index, refill_index
from tiered_kv.tiers.disk.lost_files import LostFiles
from tiered_kv.tiers.disk.namespace import DiskNamespace, Operations
from tiered_kv.tiers.disk.page_io import PageIo
from tiered_kv.tiers.disk.page_mover import PageMover
from tiered_kv.tiers.disk.reader import PageReader
from tiered_kv.tiers.disk.record import ID_BYTES
from tiered_kv.tiers.disk.segment_files import SegmentFiles, segment_paths
from tiered_kv.tiers.disk.space import SpaceManager
from tiered_kv.tiers.disk.stall_watch import StallWatch
from tiered_kv.tiers.disk.stats import Counters, DiskStats
from tiered_kv.tiers.disk.write_gate import WriteGate
from tiered_kv.tiers.disk.writer import PageWriter

logger = logging.getLogger(__name__)

CAPACITY_META = "capacity_bytes"
"""Name under which the index remembers the budget of the last run."""

CLOSE_TIMEOUT_S = 30.0
_ACCESS_ROWS_PER_COMMIT = 5_000


class Access(enum.Enum):
    """What becomes of what is in a directory that is opened."""

    NORMAL = enum.auto()
    READ_ONLY = enum.auto()
    """Nothing on disk is changed, and nothing stored: for a disk that cannot be written."""
    AFRESH = enum.auto()
    """It is deleted, whatever its format, key or damage."""


class DiskStore:
    """Pages of many namespaces in one directory, owned by one process at a time."""

    def __init__(
        self,
        lock: OwnerLock,
        *,
        capacity_bytes: int,
        io_threads: int,
        io_mode: IoMode,
        sync_writes: bool,
        io_ops: IoOps,
        key: bytes | None,
    ) -> None:
        """Use `open`. Raises DiskTierError, OSError, sqlite3.Error or ValueError."""
        self.directory = directory = lock.directory
        self.read_only = read_only = lock.read_only
        self._lock = lock
        cipher = open_cipher(directory, key, read_only=read_only)
        self._is_encrypted = cipher is not None
        self._paths = choose_path(directory, io_ops, mode=io_mode)
        self._budget = Budget(capacity_bytes)
        self._counters = Counters()
        self._gate = WriteGate(str(directory), read_only=read_only)
        self._stalls = StallWatch(str(directory))
        self._files = SegmentFiles(
            segments_directory(directory, read_only=read_only),
            io_ops,
            sync_writes=sync_writes,
            read_only=read_only,
            watch=self._stalls.watch,
        )
        self._index, self._catalog = self._open_index(sync_writes=sync_writes)
        page_io = PageIo(
            self._files,
            io_ops,
            self._paths,
            ScratchPool(),
            self._counters,
            stalls=self._stalls,
            cipher=cipher,
        )
        mover = PageMover(self._catalog, page_io)
        self._space = SpaceManager(
            self._catalog,
            self._index,
            self._files,
            mover,
            self._budget,
            self._counters,
            other_bytes=size_of_aside(directory),
        )
        if not read_only:
            try:
                self._space.shrink_to_budget()
            except BaseException:
                self._index.close()
                raise
        self._lost_files = LostFiles(self._catalog, self._files, self._space)
        # One pool each: a request that waits for its pages must not queue behind write-backs.
        self._read_pool, self._write_pool = IoPool(io_threads), IoPool(io_threads)
        self._operations = self._make_operations(page_io)
        self._namespace_lock = threading.Lock()
        self._close_lock = threading.Lock()
        self._is_closed = False

    def _open_index(self, *, sync_writes: bool) -> tuple[PageIndex, Catalog]:
        if self.read_only:
            return open_frozen_index(self.directory, self._files)
        index, catalog = open_index(
            self.directory,
            self._files,
            lambda: PageIndex(
                self.directory,
                wal_blocks=self._budget.wal_blocks,
                sync_commits=sync_writes,
                has_room=self._has_room_aside,
                watch=self._stalls.watch,
            ),
            self._has_room_aside,
        )
        index.set_meta(CAPACITY_META, self._budget.capacity_bytes)
        return index, catalog

    def _make_operations(self, page_io: PageIo) -> Operations:
        reader = PageReader(
            self._catalog,
            self._index,
            self._space,
            page_io,
            self._read_pool,
            self._gate,
            self._lost_files,
            self._counters,
        )
        writer = PageWriter(
            self._catalog,
            self._index,
            self._space,
            page_io,
            self._write_pool,
            self._gate,
            self._counters,
            self._mend_index,
        )
        return Operations(reader, writer, self._stalls)

    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        capacity_bytes: int,
        io_threads: int = 4,
        io_mode: IoMode = IoMode.AUTO,
        sync_writes: bool = False,
        io_ops: IoOps | None = None,
        key: bytes | None = None,
        access: Access = Access.NORMAL,
    ) -> Self:
        """Open (or make) a disk tier.

        capacity_bytes: hard limit on everything below `directory`.
        io_threads: I/Os in flight per batch of reads or writes.
        io_mode: past the page cache, through it, or decided from I/O to I/O (see `io_path`).
        sync_writes: acknowledge a page only once it would survive a power loss.
        io_ops: the system calls to use (tests replace them).
        key: 32 bytes to encrypt pages with (`encryption.read_key_file`); None for plain pages.
        access: whether what is there is used, only read, or deleted at once.

        Raises DiskTierError: in use by another process, not a disk tier's directory, capacity too
        small, no or the wrong key for its pages; DiskStateError where the disk is at fault.
        """
        directory = Path(directory).absolute()
        io_ops = io_ops or IoOps()
        if io_threads < 1:
            raise DiskTierError(f"The disk tier needs at least 1 I/O thread, not {io_threads}.")
        if Budget(capacity_bytes).segment_space == 0:
            raise DiskTierError(
                f"The disk tier's capacity of {capacity_bytes} bytes is too small to hold any "
                "page: give it some megabytes at least."
            )
        try:
            read_only = access is Access.READ_ONLY
            prepare_directory(directory, read_only=read_only)
            lock = OwnerLock(directory, read_only=read_only)
            try:
                if access is Access.AFRESH:
                    erase(directory)
                elif not read_only:
                    erase_unreadable(directory)
                return cls(
                    lock,
                    capacity_bytes=capacity_bytes,
                    io_threads=io_threads,
                    io_mode=io_mode,
                    sync_writes=sync_writes,
                    io_ops=io_ops,
                    key=key,
                )
            except BaseException:
                lock.release()
                raise
        except (OSError, sqlite3.Error, ValueError) as error:
            raise open_error(directory, error) from error

    def namespace(
        self, namespace_id: bytes, page_bytes: int, description: str = ""
    ) -> DiskNamespace:
        """The pages of one namespace, which is made if it is new. Never waits for the disk.

        namespace_id: 32 bytes. page_bytes: payload bytes of every page in it.
        Raises DiskTierError if the namespace has another page size, or the capacity is too small.
        """
        if len(namespace_id) != ID_BYTES:
            raise ValueError(f"a namespace id has {ID_BYTES} bytes, not {len(namespace_id)}")
        if page_bytes < 1:
            raise ValueError(f"a page has at least 1 byte, not {page_bytes}")
        with self._namespace_lock:
            known = self._catalog.find_namespace(namespace_id)
            if known is not None and known.page_bytes != page_bytes:
                raise DiskTierError(
                    f"Namespace {namespace_id.hex()[:16]} in {self.directory} holds pages of "
                    f"{known.page_bytes} bytes, not {page_bytes}: two layouts must not share one "
                    "namespace id."
                )
            number = known.number if known else max(self._catalog.namespaces, default=0) + 1
            entries = known or NamespaceEntries(number, namespace_id, page_bytes, description)
            self._budget.slots_per_segment(entries.record_bytes)
            if known is None or (description and description != known.description):
                entries.description, entries.is_recorded = description, False
                with self._catalog.lock:
                    self._catalog.namespaces[number] = entries
            return DiskNamespace(entries, self._operations)

    def stats(self, index_bytes: int | None = None) -> DiskStats:
        """index_bytes: as `index_bytes` said last, for who must not wait for the disk."""
        with self._catalog.lock:
            segments = list(self._catalog.segments.values())
            pages, payload_bytes = self._catalog.n_pages(), self._catalog.payload_bytes()
        on_disk = sum(segment.file_bytes for segment in segments)
        on_disk += self.index_bytes() if index_bytes is None else index_bytes
        is_stalled = self._stalls.is_stalled()
        return DiskStats(
            pages=pages,
            bytes_used=payload_bytes,
            bytes_on_disk=on_disk,
            capacity=self._budget.capacity_bytes,
            segments=len(segments),
            degraded=self._gate.is_degraded or is_stalled,
            stalled=is_stalled,
            direct_io=self._paths.use_direct(Reuse.LATER),
            direct_io_soon=self._paths.use_direct(Reuse.SOON),
            encrypted=self._is_encrypted,
            **self._counters.snapshot(),
        )

    def index_bytes(self) -> int:
        """Bytes of the index's files now. Raises OSError."""
        n_bytes = 0
        for path in index_files(self.directory):
            with contextlib.suppress(FileNotFoundError):
                n_bytes += path.stat().st_size
        return n_bytes

    def namespaces(self) -> list[DiskNamespace]:
        """Every namespace known, whether or not it holds pages now."""
        return [
            DiskNamespace(entries, self._operations)
            for entries in list(self._catalog.namespaces.values())
        ]

    def collect_garbage(self) -> int:
        """Delete segments that hold no page, compact the index; returns the bytes given back.

        Raises DiskTierError if the index cannot be written.
        """
        before = self.stats().bytes_on_disk
        try:
            self._space.delete_free()
        except (OSError, sqlite3.Error) as error:
            raise DiskTierError(f"Cannot tidy the disk tier {self.directory}: {error}.") from error
        return max(before - self.stats().bytes_on_disk, 0)

    def clear(self) -> None:
        """Delete every page. Raises DiskTierError if the index cannot be written."""
        try:
            self._space.clear()
        except (OSError, sqlite3.Error) as error:
            raise DiskTierError(f"Cannot clear the disk tier {self.directory}: {error}.") from error

    def look_after_files(self) -> bool:
        """Forget segments whose files somebody has deleted or cut.

        False if the directory itself, its lock or its index is gone: then the store is of no use.
        Costs a system call for every segment. Raises OSError.
        """
        with self._stalls.watch():
            if not (
                self._lock.is_in_place()
                and self._index.is_in_place()
                and self._files.directory.is_dir()
            ):
                return False
            self._lost_files.forget_all()
        return True

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Finish the operations under way, save what is known about use, give up ownership.

        Later reads and writes do nothing and return 0. What is under way after `timeout_s` is left
        to the end of the process, ownership too. Closing twice is harmless.
        """
        with self._close_lock:
            if self._is_closed:
                return
            self._is_closed = True
        if not self._operations.shut(timeout_s):
            logger.warning(
                "Disk tier %s does not answer for %.0f s: closing it is left to the end of the "
                "process.",
                self.directory,
                timeout_s,
            )
            return
        self._operations.end_threads()
        self._read_pool.close()
        self._write_pool.close()
        try:
            if not self.read_only:
                self._save_access()
                self._index.compact()
        except sqlite3.Error as error:
            logger.warning("Disk tier: the order of use was not saved (%s).", error)
        self._index.close()
        for segment in self._catalog.segments.values():
            self._files.close(segment)
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _has_room_aside(self, n_bytes: int) -> bool:
        """May a damaged index of this size stay beside the segments and a new index as large?"""
        segments = sum(path.stat().st_size for path in segment_paths(self._files.directory))
        return segments + 3 * n_bytes <= self._budget.segment_space

    def _mend_index(self) -> None:
        refill_index(self._index, self._catalog)
        # The damaged file was set aside, and takes room from now on.
        self._space.other_bytes = size_of_aside(self.directory)

    def _save_access(self) -> None:
        """The next run shall know which pages were used lately."""
        rows = [
            (access, loc)
            for segment in self._catalog.segments.values()
            if segment.touched
            for access, loc, _ in segment.access_rows()
            if access & 1  # What was not read is in the index as it is.
        ]
        for start in range(0, len(rows), _ACCESS_ROWS_PER_COMMIT):
            self._index.save_access(rows[start : start + _ACCESS_ROWS_PER_COMMIT])
