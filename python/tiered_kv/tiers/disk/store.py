"""The disk tier's front door: open a directory, take namespaces from it, close it."""

from __future__ import annotations

import contextlib
import enum
import logging
import sqlite3
import threading
import time
from pathlib import Path
from typing import Self

from tiered_kv.core.errors import DiskTierError
from tiered_kv.tiers.disk.budget import Budget
from tiered_kv.tiers.disk.buffers import ScratchPool
from tiered_kv.tiers.disk.directory import (
    OwnerLock,
    erase,
    erase_unreadable,
    open_cipher,
    open_error,
    prepare_directory,
    segments_directory,
)
from tiered_kv.tiers.disk.index import PageIndex, size_of_aside
from tiered_kv.tiers.disk.index_upkeep import CAPACITY_META, IndexUpkeep
from tiered_kv.tiers.disk.io_ops import IoOps
from tiered_kv.tiers.disk.io_path import IoMode, Reuse, choose_path
from tiered_kv.tiers.disk.io_pool import IoPool
from tiered_kv.tiers.disk.keeper import Keeper
from tiered_kv.tiers.disk.loaded import Loaded
from tiered_kv.tiers.disk.loading import fate_of, open_frozen_index, open_index
from tiered_kv.tiers.disk.lost_files import LostFiles
from tiered_kv.tiers.disk.namespace import DiskNamespace, Operations
from tiered_kv.tiers.disk.page_io import PageIo
from tiered_kv.tiers.disk.page_mover import PageMover
from tiered_kv.tiers.disk.reader import PageReader
from tiered_kv.tiers.disk.reclaimer import Reclaimer
from tiered_kv.tiers.disk.record import ID_BYTES
from tiered_kv.tiers.disk.segment_files import SegmentFiles, segment_paths
from tiered_kv.tiers.disk.space import SpaceManager
from tiered_kv.tiers.disk.stall_watch import StallWatch
from tiered_kv.tiers.disk.stats import Counters, DiskStats
from tiered_kv.tiers.disk.write_gate import WriteGate
from tiered_kv.tiers.disk.writer import PageWriter

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 30.0


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
        # What is tried again every minute must leave nothing open.
        with contextlib.ExitStack() as undo:
            undo.callback(self._files.close)
            page_io = PageIo(
                self._files,
                io_ops,
                self._paths,
                ScratchPool(),
                self._counters,
                stalls=self._stalls,
                cipher=cipher,
            )
            self._index, loaded = self._open_index(page_io, sync_writes=sync_writes)
            undo.callback(self._index.close)
            self._catalog = loaded.catalog
            self._keeper = Keeper(
                directory,
                self._catalog,
                saved_generation=loaded.saved_generation,
                sync_writes=sync_writes,
            )
            self._space = SpaceManager(
                self._catalog,
                self._budget,
                wake_keeper=self._keeper.wake,
                is_stalled=self._stalls.is_stalled,
                other_bytes=size_of_aside(directory),
            )
            loaded.adopt(self._space)
            self._lost_files = LostFiles(self._catalog, self._files, self._space)
            # One pool each: a request that waits for its pages must not queue behind write-backs.
            self._read_pool, self._write_pool = IoPool(io_threads), IoPool(io_threads)
            self._upkeep = IndexUpkeep(
                self._catalog, self._index, self._space, capacity_bytes=capacity_bytes
            )
            self._operations = self._make_operations(page_io)
            self._close_lock = threading.Lock()
            self._is_closed = False
            if not read_only:
                self._start_keeper(page_io)
            undo.pop_all()

    def _open_index(self, page_io: PageIo, *, sync_writes: bool) -> tuple[PageIndex, Loaded]:
        if self.read_only:
            return open_frozen_index(self.directory, self._files)
        index, loaded = open_index(
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
            page_io.is_whole,
        )
        try:
            index.set_meta(CAPACITY_META, self._budget.capacity_bytes)
        except BaseException:
            index.close()
            raise
        return index, loaded

    def _make_operations(self, page_io: PageIo) -> Operations:
        reader = PageReader(
            self._catalog,
            self._index,
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
        return Operations(self._catalog, reader, writer, self._stalls)

    def _start_keeper(self, page_io: PageIo) -> None:
        reclaimer = Reclaimer(
            self._catalog,
            self._index,
            self._files,
            self._space,
            PageMover(self._catalog, self._index, page_io, self._write_pool),
            self._counters,
            pause=self._keeper.pause,
            save_generation=self._keeper.save_generation,
        )
        # Before anybody writes: the budget may be smaller than it was.
        while reclaimer.shrink():
            pass
        self._keeper.start(self._space, reclaimer, self._upkeep, self._mend_index)

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
        with self._catalog.lock:
            entries = self._catalog.open_namespace(namespace_id, page_bytes, description)
        if entries.page_bytes != page_bytes:
            raise DiskTierError(
                f"Namespace {namespace_id.hex()[:16]} in {self.directory} holds pages of "
                f"{entries.page_bytes} bytes, not {page_bytes}: two layouts must not share one "
                "namespace id."
            )
        self._budget.slots_per_segment(entries.record_bytes)
        return DiskNamespace(entries, self._operations)

    def stats(self) -> DiskStats:
        """Never waits for the disk. Microseconds: the scheduler's thread asks once a second."""
        is_stalled = self._stalls.is_stalled()
        return DiskStats(
            pages=self._catalog.n_pages,
            bytes_used=self._catalog.payload_bytes,
            bytes_on_disk=self._space.ledger.file_bytes + self._index.n_bytes,
            capacity=self._budget.capacity_bytes,
            segments=len(self._catalog.segments),
            degraded=self._gate.is_degraded or is_stalled,
            stalled=is_stalled,
            direct_io=self._paths.last_direct(Reuse.LATER),
            direct_io_soon=self._paths.last_direct(Reuse.SOON),
            encrypted=self._is_encrypted,
            **self._counters.snapshot(),
        )

    def namespaces(self) -> list[DiskNamespace]:
        """Every namespace that has pages."""
        with self._catalog.lock:
            found = [entries for entries in self._catalog.namespaces.values() if entries.n_pages]
        return [DiskNamespace(entries, self._operations) for entries in found]

    def collect_garbage(self) -> int:
        """Delete segments that hold no page, compact the index; returns the bytes given back.

        Waits until that is done. Raises DiskTierError if the index cannot be written.
        """
        before = self.stats().bytes_on_disk
        try:
            self._keeper.tidy()
        except (OSError, sqlite3.Error) as error:
            raise DiskTierError(f"Cannot tidy the disk tier {self.directory}: {error}.") from error
        return max(before - self.stats().bytes_on_disk, 0)

    def clear(self) -> None:
        """Forget every page, at once: waits for nothing, does no I/O and never raises.

        What is being written is not acknowledged any more. Files are deleted behind. What was
        cleared does not come back after a crash once anything new was acknowledged, or the store
        closed; a crash within moments may bring it back.
        """
        self._space.clear()
        self._keeper.wake()

    def look_after_files(self) -> bool:
        """Forget segments whose files somebody has deleted or cut.

        False if the directory itself, its lock or its index is gone: then the store is of no use.
        Costs a system call for every segment, up to 2,000. Raises OSError.
        """
        with self._stalls.watch():
            are_ours = self._lock.is_in_place() and self._index.is_in_place()
            if not (are_ours and self._files.directory.is_dir()):
                return False
            self._lost_files.look()
        return True

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> bool:
        """Finish the operations under way, save what is known about use, give up ownership.

        Later reads and writes do nothing and return 0. False if something is still under way after
        `timeout_s`: what is not closed by another call is closed by the end of the process. Closing
        twice is harmless.
        """
        deadline = time.monotonic() + timeout_s
        with self._close_lock:
            return self._is_closed or self._close(deadline)

    def _close(self, deadline: float) -> bool:
        if not self._operations.shut(max(deadline - time.monotonic(), 0.0)):
            logger.warning("Disk tier %s does not answer, and cannot be closed.", self.directory)
            return False
        self._operations.end_threads()
        if not self._keeper.stop(max(deadline - time.monotonic(), 0.0)):
            return False
        self._read_pool.close()
        self._write_pool.close()
        self._index.close()
        self._files.close()
        self._lock.release()
        self._is_closed = True
        return True

    @property
    def counters(self) -> Counters:
        """They count on when the store is closed."""
        return self._counters

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _has_room_aside(self, n_bytes: int) -> bool:
        """May a damaged index of this size stay beside the segments and a new index as large?"""
        segments = 0
        for path in segment_paths(self._files.directory):
            with contextlib.suppress(OSError):  # One that cannot be looked at holds nothing.
                segments += path.stat().st_size
        return segments + 3 * n_bytes <= self._budget.segment_space

    def _mend_index(self) -> None:
        try:
            aside = self._upkeep.mend()
            # The damaged file takes room from now on.
            self._space.ledger.other_bytes = size_of_aside(self.directory)
        except (OSError, sqlite3.Error) as error:
            logger.warning(
                "Disk tier: the index is damaged and cannot be written anew (%s).", error
            )
        else:
            logger.warning("Disk tier: the index was damaged: %s, written anew.", fate_of(aside))
        self._keeper.wake()
