"""Carries pages from a segment that is being reclaimed to one that is being filled."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from tiered_kv.tiers.disk.buffers import AlignedBuffer
from tiered_kv.tiers.disk.catalog import Catalog, NamespaceEntries
from tiered_kv.tiers.disk.faults import Blame, blame_of
from tiered_kv.tiers.disk.index import PageRow
from tiered_kv.tiers.disk.page_io import (
    LARGEST_IO_BYTES,
    Outcome,
    PageIo,
    PageKind,
    PageTransfer,
    plan_runs,
)
from tiered_kv.tiers.disk.segment import Segment, location, segment_of, slot_of


class PageMover:
    """Copies through memory of bounded size; a page that fails its checksum is left behind."""

    def __init__(self, catalog: Catalog, page_io: PageIo) -> None:
        self._catalog = catalog
        self._page_io = page_io
        self._memory: AlignedBuffer | None = None

    def copy(
        self, source: Segment, source_slots: Sequence[int], targets: Sequence[tuple[Segment, int]]
    ) -> list[PageRow]:
        """Copy records to the target slots; returns the index rows of the copies, uncommitted.

        Raises OSError if a write fails, or a read for a reason that isn't the page's.
        """
        with self._catalog.lock:
            pages = [
                (source.owners[slot], page_hash, slot, source.access[slot])
                for slot in source_slots
                if (page_hash := source.page_hashes[slot]) is not None
            ]
        pages.sort()
        placed = list(zip(pages, targets, strict=False))
        rows: list[PageRow] = []
        for owner, group in itertools.groupby(placed, key=lambda p: p[0][0]):
            entries = self._catalog.namespaces[owner]
            rest = list(group)
            chunk_pages = max(LARGEST_IO_BYTES // entries.slot_bytes, 1)
            while rest:
                chunk, rest = rest[:chunk_pages], rest[chunk_pages:]
                rows += self._copy_chunk(entries, source, chunk)
        return rows

    def rebind(self, source: Segment, rows: Sequence[PageRow]) -> int:
        """The committed copies take the place of the originals. The caller holds the lock."""
        moved = 0
        for row in rows:
            entries = self._catalog.namespaces[row.namespace]
            current = entries.locations.get(row.page_hash)
            if current is None or segment_of(current) != source.number:
                continue
            target = self._catalog.segments[segment_of(row.location)]
            self._catalog.put(entries, row.page_hash, target, slot_of(row.location), row.access)
            moved += 1
        return moved

    def _copy_chunk(
        self,
        entries: NamespaceEntries,
        source: Segment,
        chunk: Sequence[tuple[tuple[int, bytes, int, int], tuple[Segment, int]]],
    ) -> list[PageRow]:
        memory = self._reserve(len(chunk) * entries.slot_bytes)
        kind = PageKind(entries.namespace_id, entries.page_bytes)
        transfers = []
        for position, ((_, page_hash, slot, _), _) in enumerate(chunk):
            start = position * entries.slot_bytes
            buffer = memory[start : start + entries.slot_bytes]
            transfers.append(PageTransfer(position, page_hash, buffer, source, slot))
        for run in plan_runs(transfers, 1):
            try:
                self._page_io.read_run(kind, run)
            except OSError as error:
                if blame_of(error) is not Blame.MEDIUM:
                    raise  # Not the page's fault: the segment is given up another time.
        good = [t for t in transfers if t.outcome is Outcome.DONE]
        rows = []
        for transfer in good:
            (owner, page_hash, _, access), (target, slot) = chunk[transfer.position]
            transfer.segment, transfer.slot = target, slot
            # The second chance is used up; the time of its last use stays.
            rows.append(PageRow(location(target.number, slot), owner, page_hash, access & ~1))
        sequence = self._catalog.clock
        for run in plan_runs(good, 1):
            self._page_io.write_run(kind, run, sequence)
        self._page_io.sync(good)
        return rows

    def _reserve(self, n_bytes: int) -> memoryview:
        if self._memory is None or len(self._memory.view) < n_bytes:
            self._memory = AlignedBuffer(n_bytes)
        return self._memory.view[:n_bytes]
