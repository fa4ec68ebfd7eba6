"""Carries pages from a segment that is being reclaimed to one that is being filled."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from tiered_kv.tiers.disk.buffers import AlignedBuffer
from tiered_kv.tiers.disk.catalog import Catalog
from tiered_kv.tiers.disk.faults import Blame, blame_of
from tiered_kv.tiers.disk.index import PageIndex
from tiered_kv.tiers.disk.io_path import Reuse
from tiered_kv.tiers.disk.io_pool import InFlight, IoPool
from tiered_kv.tiers.disk.namespace_entries import NamespaceEntries
from tiered_kv.tiers.disk.page_io import (
    Outcome,
    PageIo,
    PageKind,
    PageTransfer,
    plan_runs,
)
from tiered_kv.tiers.disk.segment import Segment, location, runs_of, segment_of

_CHUNK_BYTES = 8 << 20
_Run = Sequence[PageTransfer]


class Moved(NamedTuple):
    """One page that was copied, not committed yet."""

    page_hash: bytes
    segment: Segment
    slot: int
    access: int


class PageMover:
    """Copies through memory of bounded size; a page that fails its checksum is left behind."""

    def __init__(self, catalog: Catalog, index: PageIndex, page_io: PageIo, pool: IoPool) -> None:
        self._catalog = catalog
        self._index = index
        self._page_io = page_io
        self._pool = pool
        self._memory: AlignedBuffer | None = None

    def chunks(self, source: Segment, slots: Sequence[int]) -> Iterator[list[int]]:
        """Slots of a segment in parts to `move` one by one: each of one namespace, enough to keep
        the I/O threads busy, and little enough that who waits for the end doesn't wait long."""
        n_pages = max(_CHUNK_BYTES // source.record_bytes, 1)
        for _, group in itertools.groupby(slots, key=source.owner):
            rest = list(group)
            while rest:
                chunk, rest = rest[:n_pages], rest[n_pages:]
                yield chunk

    def move(
        self, source: Segment, slots: Sequence[int], targets: Sequence[tuple[Segment, int]]
    ) -> int:
        """Carry pages of one namespace to the target slots; returns how many arrived.

        Raises sqlite3.Error, and OSError if a write fails, or a read for a reason that isn't the
        page's.
        """
        with self._catalog.lock:
            entries = self._catalog.namespaces.get(source.owner(slots[0]))
            if entries is None or not self._catalog.is_current(source):
                return 0
            pages = [
                Moved(source.page_hash(slot), source, slot, source.used(slot))
                for slot in slots
                if source.used(slot) and source.owner(slot) == entries.number
            ]
        moved = self._copy(entries, pages, targets)
        return self._commit(entries, source, moved) if moved else 0

    def _copy(
        self,
        entries: NamespaceEntries,
        pages: Sequence[Moved],
        targets: Sequence[tuple[Segment, int]],
    ) -> list[Moved]:
        memory = self._reserve(len(pages) * entries.slot_bytes)
        kind = PageKind(entries.namespace_id, entries.page_bytes)
        step = entries.slot_bytes
        transfers = [
            PageTransfer(n, p.page_hash, memory[n * step : (n + 1) * step], p.segment, p.slot)
            for n, p in enumerate(pages)
        ]
        errors = self._run_all(
            transfers, lambda run, limit: self._page_io.read_run(kind, run, limit)
        )
        for error in errors:
            if blame_of(error) is not Blame.MEDIUM:
                raise error  # Not the page's fault: the segment is given up another time.
        good = [t for t in transfers if t.outcome is Outcome.DONE]
        for transfer, (segment, slot) in zip(good, targets, strict=False):
            transfer.segment, transfer.slot = segment, slot
        del good[len(targets) :]
        sequence = self._catalog.clock
        errors = self._run_all(
            good,
            lambda run, limit: self._page_io.write_run(kind, run, sequence, limit, Reuse.LATER),
        )
        if errors:
            raise errors[0]
        self._page_io.sync(good)
        # The second chance is used up; the time of its last use stays.
        return [Moved(t.page_hash, t.segment, t.slot, pages[t.position].access & ~1) for t in good]

    def _run_all(
        self, transfers: _Run, transfer_run: Callable[[_Run, InFlight], None]
    ) -> list[OSError]:
        errors: list[OSError] = []

        def job(run: _Run) -> Callable[[InFlight], None]:
            def work(in_flight: InFlight) -> None:
                try:
                    transfer_run(run, in_flight)
                except OSError as error:
                    errors.append(error)

            return work

        self._pool.run([job(run) for run in plan_runs(transfers, self._pool.io_threads)])
        return errors

    def _commit(self, entries: NamespaceEntries, source: Segment, moved: Sequence[Moved]) -> int:
        """The copies take the place of the originals, in the index and then in memory."""
        with self._index.lock:
            moved = [m for m in moved if self._catalog.is_current(m.segment)]
            owner = entries.number
            self._index.put_runs(
                runs_of(
                    (location(m.segment.number, m.slot), owner, m.page_hash, m.access)
                    for m in moved
                )
            )
            n_moved = 0
            with self._catalog.lock:
                for m in moved:
                    at = entries.find(m.page_hash)
                    is_there = at is not None and segment_of(at) == source.number
                    if is_there and self._catalog.is_current(m.segment):
                        self._catalog.put(entries, m.page_hash, m.segment, m.slot, m.access)
                        n_moved += 1
        return n_moved

    def _reserve(self, n_bytes: int) -> memoryview:
        if self._memory is None or len(self._memory.view) < n_bytes:
            self._memory = AlignedBuffer(n_bytes)
        return self._memory.view[:n_bytes]
