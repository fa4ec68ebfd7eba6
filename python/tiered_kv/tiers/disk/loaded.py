"""What is found on disk when a store is opened, before it takes its place in the catalog."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

import numpy as np

from tiered_kv.tiers.disk.ages import Ages
from tiered_kv.tiers.disk.catalog import Catalog
from tiered_kv.tiers.disk.generation import MAX_GENERATION
from tiered_kv.tiers.disk.index import NamespaceRow, SegmentRow
from tiered_kv.tiers.disk.ledger import Condemned
from tiered_kv.tiers.disk.namespace_entries import NamespaceEntries
from tiered_kv.tiers.disk.page_io import PageKind
from tiered_kv.tiers.disk.page_table import Keys, PageTable
from tiered_kv.tiers.disk.record import ID_BYTES
from tiered_kv.tiers.disk.segment import (
    PageRun,
    Segment,
    SegmentState,
    segment_of,
    slot_of,
)
from tiered_kv.tiers.disk.space import SpaceManager

IsWhole: TypeAlias = Callable[[PageKind, bytes, Segment, int], bool]
"""See `PageIo.is_whole`."""

_FEW_RUNS = 4
"""A full segment in more rows than this is packed."""


class Loaded:
    """Collects namespaces, segments and runs of pages, ten million pages in seconds."""

    def __init__(self, saved_generation: int | None, found: Iterable[int]) -> None:
        """saved_generation: what the directory says. If it doesn't, some of what is there may have
        been cleared: then the generation is one that isn't among those `found`. A later one among
        them is believed: its segment was made when the one before was over."""
        self.catalog = Catalog()
        """Knows the namespaces from now on, all else after `adopt`."""
        latest = max(found, default=0)
        if saved_generation is None:
            self.catalog.generation = min(latest + 1, MAX_GENERATION)
        else:
            self.catalog.generation = max(saved_generation, latest)
        self.saved_generation = saved_generation
        self.segments: dict[int, Segment] = {}
        self.condemned: list[Condemned] = []
        """Files of an older generation: cleared, and not deleted yet."""
        self.lost: list[int] = []
        self.n_pages: dict[int, int] = {}
        """By number of the namespace."""
        self.next_segment = 0
        self._keys: list[Keys] = []
        self._locations: list[Keys] = []
        self._n_runs: dict[int, int] = {}
        self._table = PageTable()

    def add_namespace(self, row: NamespaceRow) -> None:
        self.catalog.restore_namespace(row)

    def namespace_of(self, namespace_id: bytes, page_bytes: int) -> tuple[NamespaceEntries, bool]:
        """The namespace of this id, and whether it is seen for the first time."""
        entries = self.catalog.open_namespace(namespace_id, page_bytes)
        is_new = self.catalog.register(entries)
        entries.is_recorded = True
        return entries, is_new

    def add_segment(self, row: SegmentRow) -> None:
        """A segment whose file is whole."""
        self.next_segment = max(self.next_segment, row.number + 1)
        if row.generation != self.catalog.generation:
            self.condemned.append(Condemned(row.number, row.record_bytes, row.slots))
            return
        ages = self.catalog.ages
        self.segments[row.number] = Segment(row.number, row.record_bytes, row.slots, ages)

    def add_lost(self, number: int) -> None:
        self.next_segment = max(self.next_segment, number + 1)
        self.lost.append(number)

    def add_run(self, run: PageRun) -> None:
        """Pages of a segment; nothing happens if they make no sense there."""
        number = segment_of(run.location)
        segment = self.segments.get(number)
        entries = self.catalog.namespaces.get(run.namespace)
        if segment is None or entries is None or entries.record_bytes != segment.record_bytes:
            return
        if not segment.put_run(run):
            return
        n = run.n_pages
        names = np.frombuffer(run.hashes, "<u8").reshape(n, ID_BYTES // 8)
        self._keys.append(names[:, 0] ^ np.uint64(entries.salt))
        self._locations.append(np.arange(run.location, run.location + n, dtype=np.uint64))
        self.n_pages[run.namespace] = self.n_pages.get(run.namespace, 0) + n
        self._n_runs[number] = self._n_runs.get(number, 0) + 1

    def settle(self, is_whole: IsWhole | None = None) -> list[tuple[int, bytes]]:
        """When all is added: of pages that are there twice (a crash came between moving one and
        forgetting the original) the newer counts or, where `is_whole` says that it isn't, the
        other. Returns location and name of those that don't count."""
        keys, locations = (
            np.concatenate([np.zeros(0, np.uint64), *parts])
            for parts in (self._keys, self._locations)
        )
        self._keys, self._locations = [], []

        def is_second_better(first: int, second: int) -> bool:
            is_newer = self._access(first) < self._access(second)
            if is_whole is None:
                return is_newer
            entries, segment, slot = self._at(second if is_newer else first)
            kind = PageKind(entries.namespace_id, entries.page_bytes)
            return is_newer == is_whole(kind, segment.page_hash(slot), segment, slot)

        self._table, left_out = PageTable.build(keys, locations, is_second_better)
        pages = []
        for loc in left_out:
            entries, segment, slot = self._at(loc)
            pages.append((loc, segment.page_hash(slot)))
            self.n_pages[entries.number] -= 1
            segment.drop(slot)
        return pages

    def _at(self, loc: int) -> tuple[NamespaceEntries, Segment, int]:
        segment, slot = self.segments[segment_of(loc)], slot_of(loc)
        return self.catalog.namespaces[segment.owner(slot)], segment, slot

    def _access(self, loc: int) -> int:
        return self.segments[segment_of(loc)].used(slot_of(loc))

    def adopt(self, space: SpaceManager) -> None:
        """All of it, settled, is in the catalog from now on, and known to `space`."""
        catalog = self.catalog
        self._set_states()
        self._set_ages(catalog.ages)
        with catalog.lock:
            catalog.next_segment = self.next_segment
            catalog.table = self._table
            for number, entries in catalog.namespaces.items():
                catalog.count_stored(entries, self.n_pages.get(number, 0))
            for file in self.condemned:
                space.add_condemned(file)
            for segment in self.segments.values():
                space.add_loaded(segment)
                is_full = segment.state is SegmentState.SEALED
                if is_full and self._n_runs.get(segment.number, 0) > _FEW_RUNS:
                    space.to_pack.append(segment)

    def _set_states(self) -> None:
        for segment in self.segments.values():
            if segment.live == 0:
                segment.state = SegmentState.FREE
            elif segment.free_slots == 0:
                segment.state = SegmentState.SEALED

    def _set_ages(self, ages: Ages) -> None:
        """What counts as old, and how old each segment's pages are."""
        times = [np.zeros(0, np.uint64)]
        for segment in self.segments.values():
            access = segment.access
            times.append(access[access > 0] >> np.uint64(1))
        newest = [int(some.max()) if len(some) else 0 for some in times]
        self.catalog.clock = max(newest) + 1
        ages.restart(np.concatenate(times))
        by_use = sorted(zip(newest[1:], self.segments.values(), strict=True), key=lambda e: e[0])
        for n, (_, segment) in enumerate(by_use):
            segment.recount()
            segment.filled_at = n - len(by_use)
