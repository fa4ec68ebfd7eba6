"""`read_pages`: find, pin, read, verify, and forget what turned out to be damaged."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from tiered_kv.tiers.disk.catalog import Catalog
from tiered_kv.tiers.disk.faults import Blame, blame_of
from tiered_kv.tiers.disk.index import PageIndex
from tiered_kv.tiers.disk.io_path import Reuse
from tiered_kv.tiers.disk.io_pool import InFlight, IoPool
from tiered_kv.tiers.disk.lost_files import LostFiles
from tiered_kv.tiers.disk.namespace_entries import NamespaceEntries
from tiered_kv.tiers.disk.page_io import Outcome, PageIo, PageKind, PageTransfer, plan_runs
from tiered_kv.tiers.disk.segment import location
from tiered_kv.tiers.disk.stats import Counters
from tiered_kv.tiers.disk.write_gate import WriteGate

logger = logging.getLogger(__name__)

_ATTEMPTS = 3
FAILURE_MEMORY_S = 600.0
"""Of two failed reads of one page the second costs it, if they are no farther apart than this and
no read of it worked in between."""
_REMEMBERED_FAILURES = 100_000
_REREAD_TICKS = 1_000
"""Two reads of a page within so many operations of the store tell that a third is near."""


class PageReader:
    """Thread-safe; one batch uses all I/O threads."""

    def __init__(
        self,
        catalog: Catalog,
        index: PageIndex,
        page_io: PageIo,
        pool: IoPool,
        gate: WriteGate,
        lost_files: LostFiles,
        counters: Counters,
    ) -> None:
        self._catalog = catalog
        self._index = index
        self._page_io = page_io
        self._pool = pool
        self._gate = gate
        self._lost_files = lost_files
        self._counters = counters
        self._now = time.monotonic
        self._lock = threading.Lock()
        # When a read of this page at this location failed, where that may be the page's own fault;
        # oldest first.
        self._failed_at: dict[tuple[int, bytes], float] = {}

    def read(
        self,
        entries: NamespaceEntries,
        hashes: Sequence[bytes],
        buffers: Sequence[memoryview],
        reuse: Reuse,
    ) -> int:
        """Fill the buffers; returns how many leading pages were read and verified.

        While the disk does not answer, all are misses at once.
        """
        done = 0
        for _ in range(_ATTEMPTS):
            if self._page_io.stalls.is_stalled():
                break
            transfers, is_reread = self._find(entries, hashes[done:], buffers[done:])
            if reuse is Reuse.UNKNOWN:
                reuse = Reuse.SOON if is_reread else Reuse.LATER
            n_read = self._read_found(entries, transfers, reuse)
            done += n_read
            if n_read == len(transfers) or not self._was_moved(entries, transfers[n_read]):
                break
        self._counters.add(
            reads=done, read_bytes=done * entries.page_bytes, read_misses=len(hashes) - done
        )
        return done

    def check(
        self, entries: NamespaceEntries, hashes: Sequence[bytes], buffers: Sequence[memoryview]
    ) -> list[bool]:
        """Whether each page can be read back whole. Changes nothing, not even the order of use."""
        good = [False] * len(hashes)
        transfers: list[PageTransfer] = []
        with self._catalog.lock:
            for position, page_hash in enumerate(hashes):
                found = self._catalog.locate(entries, page_hash)
                if found is not None:
                    transfers.append(PageTransfer(position, page_hash, buffers[position], *found))
        self._transfer(entries, transfers, Reuse.LATER)
        for transfer in transfers:
            good[transfer.position] = transfer.outcome is Outcome.DONE
        return good

    def drop(self, entries: NamespaceEntries, hashes: Sequence[bytes]) -> int:
        """Forget pages; returns how many there were. Raises sqlite3.Error."""
        dropped: list[tuple[int, bytes]] = []
        with self._catalog.lock:
            for page_hash in hashes:
                loc = entries.find(page_hash)
                if loc is not None and self._catalog.drop(entries, page_hash, loc):
                    dropped.append((loc, page_hash))
        self._index.delete_pages(dropped)
        return len(dropped)

    def touch(self, entries: NamespaceEntries, hashes: Iterable[bytes]) -> None:
        with self._catalog.lock:
            self._catalog.touch(entries, hashes)

    def drain_dropped(self, entries: NamespaceEntries) -> list[bytes] | None:
        if not entries.has_dropped:  # without the lock: what is missed comes with the next call
            return []
        with self._catalog.lock:
            return entries.drain_dropped()

    def _find(
        self, entries: NamespaceEntries, hashes: Sequence[bytes], buffers: Sequence[memoryview]
    ) -> tuple[list[PageTransfer], bool]:
        """The leading pages that are stored; and whether most of them were read lately already:
        then no tier above keeps them, and they come again."""
        transfers: list[PageTransfer] = []
        n_reread = 0
        with self._catalog.lock:
            clock = self._catalog.tick()
            for position, page_hash in enumerate(hashes):
                found = self._catalog.locate(entries, page_hash)
                if found is None:
                    break
                segment, slot = found
                access = segment.used(slot)
                n_reread += access & 1 and clock - (access >> 1) <= _REREAD_TICKS
                segment.touch(slot, clock)
                transfers.append(
                    PageTransfer(position, page_hash, buffers[position], segment, slot)
                )
        return transfers, 2 * n_reread > len(transfers)

    def _read_found(
        self, entries: NamespaceEntries, transfers: Sequence[PageTransfer], reuse: Reuse
    ) -> int:
        self._transfer(entries, transfers, reuse)
        bad = [t for t in transfers if t.outcome is not Outcome.DONE]
        if self._failed_at:
            self._forgive(t for t in transfers if t.outcome is Outcome.DONE)
        if not bad:
            return len(transfers)
        self._forget_bad(entries, bad)
        return bad[0].position

    def _transfer(
        self, entries: NamespaceEntries, transfers: Sequence[PageTransfer], reuse: Reuse
    ) -> None:
        """Read the pages and note what became of each."""
        kind = PageKind(entries.namespace_id, entries.page_bytes)
        runs = plan_runs(transfers, self._pool.io_threads)
        self._pool.run([self._job(kind, run, reuse) for run in runs])

    def _was_moved(self, entries: NamespaceEntries, transfer: PageTransfer) -> bool:
        """Did a reclaim carry the page to another slot while it was being read?"""
        loc = entries.find(transfer.page_hash)
        return loc is not None and loc != location(transfer.segment.number, transfer.slot)

    def _job(
        self, kind: PageKind, run: Sequence[PageTransfer], reuse: Reuse
    ) -> Callable[[InFlight], None]:
        def attempt(part: Sequence[PageTransfer], in_flight: InFlight) -> None:
            try:
                self._page_io.read_run(kind, part, in_flight, reuse)
            except OSError as error:
                for transfer in part:
                    transfer.error = error

        def read(in_flight: InFlight) -> None:
            attempt(run, in_flight)
            error = run[0].error
            # One bad block must not cost its neighbours.
            if error is not None and len(run) > 1 and blame_of(error) is Blame.MEDIUM:
                for transfer in run:
                    attempt([transfer], in_flight)

        return read

    def _forget_bad(self, entries: NamespaceEntries, bad: Sequence[PageTransfer]) -> None:
        """Drop damaged pages at once, unreadable ones when they fail a second time.

        A failure that isn't the page's costs no page.
        """
        for transfer in bad:
            if transfer.error is not None and blame_of(transfer.error) is Blame.PROCESS:
                self._gate.shut(transfer.error)
        self._lost_files.forget(
            t.segment
            for t in bad
            if t.error is not None and blame_of(t.error) in (Blame.HANDLE, Blame.MEDIUM)
        )
        dropped: list[tuple[int, bytes]] = []
        n_failed = n_damaged = 0
        for transfer in bad:
            loc = location(transfer.segment.number, transfer.slot)
            if entries.find(transfer.page_hash) != loc:
                continue  # Moved or given up meanwhile: the slot was somebody else's.
            if transfer.outcome is Outcome.FAILED:
                n_failed += 1
                if not self._may_be_lost(transfer, loc):
                    continue
            with self._catalog.lock:
                is_dropped = self._catalog.drop(entries, transfer.page_hash, loc)
            if is_dropped:
                dropped.append((loc, transfer.page_hash))
                n_damaged += transfer.outcome is Outcome.DAMAGED
        self._counters.add(io_errors=n_failed, checksum_failures=n_damaged)
        if dropped:
            logger.warning(
                "Disk tier: dropped %d pages that cannot be read back (%d damaged, %d unreadable).",
                len(dropped),
                n_damaged,
                len(dropped) - n_damaged,
            )
            with contextlib.suppress(sqlite3.Error):
                self._index.delete_pages(dropped)

    def _may_be_lost(self, transfer: PageTransfer, loc: int) -> bool:
        """Is this the second failure of the page's own within a short time?"""
        if transfer.error is None or blame_of(transfer.error) is not Blame.MEDIUM:
            return False
        now = self._now()
        with self._lock:
            failed_at = self._failed_at.pop((loc, transfer.page_hash), None)
            if failed_at is not None and now - failed_at <= FAILURE_MEMORY_S:
                return True
            self._failed_at[loc, transfer.page_hash] = now
            if len(self._failed_at) > _REMEMBERED_FAILURES:
                del self._failed_at[next(iter(self._failed_at))]
            return False

    def _forgive(self, done: Iterable[PageTransfer]) -> None:
        with self._lock:
            for transfer in done:
                loc = location(transfer.segment.number, transfer.slot)
                self._failed_at.pop((loc, transfer.page_hash), None)
