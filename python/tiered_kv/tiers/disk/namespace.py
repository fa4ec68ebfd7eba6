"""`DiskNamespace`: what the transfer threads and the scheduler see of the disk tier."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Sequence

from tiered_kv.tiers.disk.attempt import Attempt
from tiered_kv.tiers.disk.buffers import as_bytes
from tiered_kv.tiers.disk.catalog import Catalog
from tiered_kv.tiers.disk.io_path import Reuse
from tiered_kv.tiers.disk.io_pool import DaemonThreads
from tiered_kv.tiers.disk.namespace_entries import NamespaceEntries
from tiered_kv.tiers.disk.reader import PageReader
from tiered_kv.tiers.disk.record import ID_BYTES
from tiered_kv.tiers.disk.stall_watch import StallWatch
from tiered_kv.tiers.disk.writer import PageWriter

_WRITES_AT_ONCE = 16
"""Calls to write pages that run at once; more wait their turn."""
_LOOK_S = 0.25
"""So often a caller who waits for a write looks whether the disk still answers."""


class Operations:
    """Reads and writes of an open store; counts those under way so that closing can wait."""

    def __init__(
        self, catalog: Catalog, reader: PageReader, writer: PageWriter, stalls: StallWatch
    ) -> None:
        self.catalog = catalog
        self.reader = reader
        self._writer = writer
        self._stalls = stalls
        self._threads = DaemonThreads(_WRITES_AT_ONCE, "tiered-kv-disk-write")
        self._idle = threading.Condition()
        self._under_way = 0
        self._is_shut = False

    @contextlib.contextmanager
    def enter(self) -> Iterator[bool]:
        """Yields False if the store is closed."""
        is_open = self._begin()
        try:
            yield is_open
        finally:
            if is_open:
                self._end()

    def _begin(self) -> bool:
        with self._idle:
            self._under_way += not self._is_shut
            return not self._is_shut

    def _end(self) -> None:
        with self._idle:
            self._under_way -= 1
            self._idle.notify_all()

    def write(
        self,
        entries: NamespaceEntries,
        hashes: Sequence[bytes],
        views: Sequence[memoryview],
        reuse: Reuse,
    ) -> int:
        """Write on another thread, and leave it to itself when the disk does not answer.

        Its pages then count as not written, and the caller may use their memory for others. (What
        is read cannot be left: the kernel would write into that memory later.)
        """
        if not self._begin():
            return 0
        attempt = Attempt()

        def write() -> int:
            try:
                return self._writer.write(entries, hashes, views, reuse, attempt)
            finally:
                self._end()

        future = self._threads.submit(write)
        while True:
            try:
                return future.result(_LOOK_S)
            except TimeoutError:
                if self._stalls.is_stalled():
                    attempt.abandon()
                    return 0

    def is_stalled(self) -> bool:
        return self._stalls.is_stalled()

    def shut(self, timeout_s: float) -> bool:
        """Refuse new operations and wait for those under way; False if they don't end in time."""
        with self._idle:
            self._is_shut = True
            return self._idle.wait_for(lambda: self._under_way == 0, timeout_s)

    def end_threads(self) -> None:
        self._threads.close()


class DiskNamespace:
    """The pages of one model, dtype, layout and tenant. Every method is thread-safe.

    Buffers are contiguous memoryviews, `page_bytes` or `slot_bytes` long. Those that start at a
    multiple of 4096 bytes are read and written in place, others through a copy.
    """

    def __init__(self, entries: NamespaceEntries, operations: Operations) -> None:
        self.namespace_id = entries.namespace_id
        self.page_bytes = entries.page_bytes
        """Payload bytes of a page."""
        self.slot_bytes = entries.slot_bytes
        """`page_bytes` rounded up to a multiple of 4096: a buffer this long needs no copy at all;
        what it holds after `page_bytes` is written too, and undefined after a read."""
        self._entries = entries
        self._operations = operations

    def __len__(self) -> int:
        """Pages stored."""
        return self._entries.n_pages

    def contains(self, page_hash: bytes) -> bool:
        """Is the page stored? A lookup in memory: never waits."""
        return self._entries.find(page_hash) is not None

    def count_prefix(self, hashes: Sequence[bytes]) -> int:
        """How many leading pages are stored. Lookups in memory: never waits."""
        return self._operations.catalog.count_prefix(self._entries, hashes)

    def write_pages(
        self,
        hashes: Sequence[bytes],
        buffers: Sequence[memoryview],
        reuse: Reuse = Reuse.UNKNOWN,
    ) -> int:
        """Store pages; returns how many this call newly acknowledged.

        Pages already stored are skipped; one that another thread is writing is waited for. An
        operating error never raises: the store then stops writing for a while (`stats().degraded`).
        A disk that does not answer is waited for some seconds only; the buffers may then be used
        for other things.
        reuse: when the pages will be read from disk next; chooses the path (`io_path`).
        Raises ValueError for buffers of the wrong length.
        """
        views = self._check(hashes, buffers)
        return self._operations.write(self._entries, hashes, views, reuse)

    def read_pages(
        self,
        hashes: Sequence[bytes],
        buffers: Sequence[memoryview],
        reuse: Reuse = Reuse.UNKNOWN,
    ) -> int:
        """Fill buffers; returns the number of leading pages read and verified.

        A page that is missing, damaged or unreadable ends the prefix; buffers after it hold
        anything. An operating error never raises, and a disk that does not answer is a miss.
        reuse: when the pages will be read from disk again; chooses the path (`io_path`).
        Raises ValueError for buffers of the wrong length.
        """
        views = self._check(hashes, buffers)
        with self._operations.enter() as is_open:
            if not is_open:
                return 0
            return self._operations.reader.read(self._entries, hashes, views, reuse)

    def touch(self, hashes: Iterable[bytes]) -> None:
        """Pages are in use in a nearer tier: they stay as long as pages that are read from here.

        Without it the most wanted pages, which never leave the device, would be given up first.
        """
        self._operations.reader.touch(self._entries, hashes)

    def drain_dropped(self) -> list[bytes] | None:
        """Pages that were stored and no longer are, whatever the reason, since the last call.

        None if there were more than 65,536, or all were cleared: then ask `contains` for what
        matters. Of several callers each drop reaches only one. Costs nothing until pages are
        dropped.
        """
        return self._operations.reader.drain_dropped(self._entries)

    def is_stalled(self) -> bool:
        """Is the disk not answering? Never waits."""
        return self._operations.is_stalled()

    @property
    def description(self) -> str:
        """What the namespace is, in words, as its owner said."""
        return self._entries.description

    def hashes(self) -> list[bytes]:
        """Every page stored now, neighbours on disk next to each other."""
        return self._operations.catalog.hashes_of(self._entries)

    def check_pages(self, hashes: Sequence[bytes], buffers: Sequence[memoryview]) -> list[bool]:
        """Whether each page can be read back whole; changes nothing."""
        views = self._check(hashes, buffers)
        with self._operations.enter() as is_open:
            if not is_open:
                return [False] * len(hashes)
            return self._operations.reader.check(self._entries, hashes, views)

    def drop_pages(self, hashes: Sequence[bytes]) -> int:
        """Forget pages; returns how many there were. Raises sqlite3.Error."""
        with self._operations.enter() as is_open:
            return self._operations.reader.drop(self._entries, hashes) if is_open else 0

    def _check(self, hashes: Sequence[bytes], buffers: Sequence[memoryview]) -> list[memoryview]:
        if len(hashes) != len(buffers):
            raise ValueError(f"{len(hashes)} hashes but {len(buffers)} buffers")
        views = [as_bytes(buffer) for buffer in buffers]
        for page_hash, view in zip(hashes, views, strict=True):
            if len(page_hash) != ID_BYTES:
                raise ValueError(f"a page hash has {ID_BYTES} bytes, not {len(page_hash)}")
            if len(view) not in (self.page_bytes, self.slot_bytes):
                raise ValueError(
                    f"a buffer has {len(view)} bytes, a page {self.page_bytes} (or padded "
                    f"{self.slot_bytes})"
                )
        return views
