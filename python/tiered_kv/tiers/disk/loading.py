"""Start-up: the index into memory, or, if the index is damaged, the segments' headers into both.

Runs on the keeper's thread beside whatever the store is asked meanwhile: what is found is collected
apart, and takes its place in the catalog in one step.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tiered_kv.tiers.disk.ages import Ages
from tiered_kv.tiers.disk.catalog import Catalog
from tiered_kv.tiers.disk.generation import MAX_GENERATION, read_generation
from tiered_kv.tiers.disk.index import PageIndex, SegmentRow, set_index_aside
from tiered_kv.tiers.disk.index_upkeep import CAPACITY_META, COMPLETE_META
from tiered_kv.tiers.disk.namespace_entries import NamespaceEntries
from tiered_kv.tiers.disk.page_table import Keys, PageTable, without_repeats
from tiered_kv.tiers.disk.record import BLOCK_BYTES, ID_BYTES
from tiered_kv.tiers.disk.scan import ScannedSegment, scan_segments
from tiered_kv.tiers.disk.segment import (
    MAX_SLOTS,
    PageRun,
    Segment,
    SegmentState,
    location,
    runs_of,
    segment_of,
    slot_of,
)
from tiered_kv.tiers.disk.segment_files import SegmentFiles, segment_paths
from tiered_kv.tiers.disk.space import Condemned, SpaceManager

logger = logging.getLogger(__name__)

_SLOW_S = 2.0
"""A load that takes longer is worth a line in the log."""
_FEW_RUNS = 4
"""A full segment in more rows than this is packed."""

# Primary result codes that speak of the machine's state, not of damage in the file.
_NOT_DAMAGE = frozenset(
    {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_FULL}
)


class StoreClosedError(Exception):
    """The store is being closed."""


@dataclass
class Loaded:
    """What was found on disk, before anybody can see it."""

    generation: int
    segments: dict[int, Segment] = field(default_factory=dict)
    namespaces: dict[int, NamespaceEntries] = field(default_factory=dict)
    n_pages: dict[int, int] = field(default_factory=dict)
    n_runs: dict[int, int] = field(default_factory=dict)
    keys: list[Keys] = field(default_factory=list)
    locations: list[Keys] = field(default_factory=list)
    condemned: list[Condemned] = field(default_factory=list)
    left_alone: set[int] = field(default_factory=set)
    next_segment: int = 0
    clock: int = 1

    def add_run(self, run: PageRun) -> None:
        """Pages of a segment; nothing happens if they make no sense there."""
        number = segment_of(run.location)
        segment, entries = self.segments.get(number), self.namespaces.get(run.namespace)
        if segment is None or entries is None or entries.record_bytes != segment.record_bytes:
            return
        if not segment.put_run(run):
            return
        n = run.n_pages
        names = np.frombuffer(run.hashes, "<u8").reshape(n, ID_BYTES // 8)
        self.keys.append(names[:, 0] ^ np.uint64(entries.salt))
        self.locations.append(np.arange(run.location, run.location + n, dtype=np.uint64))
        self.n_pages[run.namespace] = self.n_pages.get(run.namespace, 0) + n
        self.n_runs[number] = self.n_runs.get(number, 0) + 1

    def set_ages(self, ages: Ages) -> None:
        """Once all pages are there: what counts as old, and how old each segment's pages are."""
        times = [np.zeros(0, np.uint64)]
        for segment in self.segments.values():
            access = segment.accesses()
            times.append(access[access > 0] >> np.uint64(1))
        newest = [int(some.max()) if len(some) else 0 for some in times]
        self.clock = max(newest) + 1
        ages.restart(np.concatenate(times))
        by_use = sorted(zip(newest[1:], self.segments.values(), strict=True), key=lambda e: e[0])
        for n, (_, segment) in enumerate(by_use):
            segment.recount()
            segment.filled_at = n - len(by_use)

    def finish(self) -> PageTable:
        """Of pages that are there twice (a crash came between moving and forgetting) one counts."""
        keys, locations = (
            np.concatenate(parts) if parts else np.zeros(0, np.uint64)
            for parts in (self.keys, self.locations)
        )
        self.keys, self.locations = [], []
        keys, locations, left_out = without_repeats(keys, locations, self._is_newer)
        for loc in left_out:
            segment, slot = self.segments[segment_of(loc)], slot_of(loc)
            self.n_pages[segment.owners[slot]] -= 1
            segment.drop(slot)
        for segment in self.segments.values():
            if segment.live == 0:
                segment.state = SegmentState.FREE
            elif segment.free_slots == 0:
                segment.state = SegmentState.SEALED
        return PageTable.build(keys, locations)

    def _is_newer(self, first: int, second: int) -> bool:
        return self._access(first) < self._access(second)

    def _access(self, loc: int) -> int:
        return self.segments[segment_of(loc)].access[slot_of(loc)]


class Loader:
    """Loads a directory into a catalog, once."""

    def __init__(
        self,
        directory: Path,
        files: SegmentFiles,
        index: PageIndex,
        catalog: Catalog,
        space: SpaceManager,
        *,
        capacity_bytes: int,
        has_room: Callable[[int], bool],
    ) -> None:
        """`has_room`: may a damaged index of this size be kept?"""
        self._directory = directory
        self._files = files
        self._index = index
        self._catalog = catalog
        self._space = space
        self._capacity_bytes = capacity_bytes
        self._has_room = has_room

    def load(self, should_stop: Callable[[], bool]) -> int | None:
        """Open the index and load it; if it is damaged, set it aside and rebuild it.

        Returns the generation that the directory says it is in; None if it does not say.
        Raises sqlite3.Error or OSError if a fresh index cannot be written either, and
        StoreClosedError.
        """
        started = time.monotonic()
        generation = read_generation(self._directory)
        try:
            self._index.open()
            self._index.check()
            if not self._index.meta(COMPLETE_META) and any(segment_paths(self._files.directory)):
                raise ValueError("it was never completed, or is new although there are segments")
            with _collector_off():
                loaded = self._read_index(generation, should_stop)
        except (sqlite3.Error, TypeError, ValueError, OverflowError) as error:
            # Flipped bytes in a row may come back as values of another type or range.
            self._index.close()
            code = getattr(error, "sqlite_errorcode", None)
            if code is not None and code & 0xFF in _NOT_DAMAGE:
                raise
            aside = set_index_aside(self._directory, self._has_room)
            self._space.other_bytes = 0 if aside is None else aside.stat().st_size
            logger.warning(
                "The disk tier's index in %s is damaged (%s): %s, rebuilding it from the segment "
                "files.",
                self._directory,
                error,
                fate_of(aside),
            )
            self._index.open()
            loaded = self._rebuild(generation, should_stop)
        table = loaded.finish()
        loaded.set_ages(self._catalog.ages)
        self._adopt(loaded, table)
        self._delete_strays(loaded)
        self._index.set_meta(CAPACITY_META, self._capacity_bytes)
        self._index.set_meta(COMPLETE_META, 1)
        took_s = time.monotonic() - started
        if took_s > _SLOW_S:
            logger.info(
                "Disk tier %s: %d pages in %d segments, loaded in %.1f s.",
                self._directory,
                self._catalog.n_pages,
                len(self._catalog.segments),
                took_s,
            )
        return generation

    # -- from the index

    def _read_index(self, generation: int | None, should_stop: Callable[[], bool]) -> Loaded:
        rows = self._index.segments()
        loaded = Loaded(_or_next(generation, [row.generation for row in rows]))
        with self._catalog.lock:
            for ns in self._index.namespaces():
                entries = self._catalog.restore_namespace(ns)
                if entries is None:
                    self._catalog.emptied.add(ns.number)
                else:
                    loaded.namespaces[ns.number] = entries
        lost = self._add_segments(loaded, rows)
        for run in self._index.runs():
            loaded.add_run(run)
            if should_stop():
                raise StoreClosedError
        for row in rows:
            if row.number in loaded.segments:
                loaded.segments[row.number].restore_recency(row.newest, row.was_read)
        if lost:
            logger.warning(
                "Disk tier: %d segment files are missing or have the wrong size; their pages are "
                "forgotten.",
                len(lost),
            )
            for number in lost:
                self._index.forget_segment(number)
        return loaded

    def _add_segments(self, loaded: Loaded, rows: list[SegmentRow]) -> list[int]:
        """Returns the numbers of segments whose file is not as the index says."""
        lost = []
        for row in rows:
            loaded.next_segment = max(loaded.next_segment, row.number + 1)
            is_there = self._look_at_file(row)
            if is_there is None:
                loaded.left_alone.add(row.number)
            elif not is_there:
                lost.append(row.number)
            elif row.generation == loaded.generation:
                path = self._files.path(row.number)
                segment = Segment(row.number, path, row.record_bytes, row.slots, self._catalog.ages)
                loaded.segments[row.number] = segment
            else:
                loaded.condemned.append(Condemned(row.number, row.record_bytes, row.slots))
        return lost

    def _look_at_file(self, row: SegmentRow) -> bool | None:
        """Is there a file of exactly this size? None if nobody can tell: then it is left alone."""
        if not (0 < row.slots <= MAX_SLOTS and row.record_bytes > BLOCK_BYTES and row.number >= 0):
            return False
        try:
            n_bytes = self._files.path(row.number).stat().st_size
        except FileNotFoundError:
            return False
        except OSError as error:
            logger.warning("Disk tier: segment file %d cannot be used (%s).", row.number, error)
            self._space.other_bytes += Segment.file_size(row.record_bytes, row.slots)
            return None
        return n_bytes == Segment.file_size(row.record_bytes, row.slots)

    # -- from the segments

    def _rebuild(self, generation: int | None, should_stop: Callable[[], bool]) -> Loaded:
        started = time.monotonic()
        loaded: Loaded | None = None
        with self._catalog.lock:
            for entries in self._catalog.namespaces.values():
                entries.is_recorded = False
        for scanned in scan_segments(self._files.directory, should_stop):
            if loaded is None:
                loaded = Loaded(_or_next(generation, [scanned.header.generation]))
            self._add_scanned(loaded, scanned)
        if should_stop():
            raise StoreClosedError
        loaded = loaded or Loaded(_or_next(generation, []))
        logger.warning(
            "Disk tier: index rebuilt in %.1f s, %d pages in %d segments.",
            time.monotonic() - started,
            sum(loaded.n_pages.values()),
            len(loaded.segments),
        )
        return loaded

    def _add_scanned(self, loaded: Loaded, scanned: ScannedSegment) -> None:
        header = scanned.header
        loaded.next_segment = max(loaded.next_segment, header.number + 1)
        if header.generation != loaded.generation:
            loaded.condemned.append(Condemned(header.number, header.record_bytes, header.slots))
            return
        path = self._files.path(header.number)
        segment = Segment(
            header.number, path, header.record_bytes, header.slots, self._catalog.ages
        )
        loaded.segments[header.number] = segment
        pages = []
        for slot, record in scanned.records:
            with self._catalog.lock:
                entries = self._catalog.open_namespace(record.namespace_id, record.payload_bytes)
                self._catalog.register(entries)
            if entries.page_bytes == record.payload_bytes:
                loaded.namespaces[entries.number] = entries
                loc = location(header.number, slot)
                pages.append((loc, entries.number, record.page_hash, max(record.sequence, 1) << 1))
        row = SegmentRow(header.number, header.record_bytes, header.slots, header.generation)
        self._index.put_segment(row)
        unknown = {p[1] for p in pages if not loaded.namespaces[p[1]].is_recorded}
        runs = runs_of(pages)
        self._index.put_runs(runs, [loaded.namespaces[number].row for number in unknown])
        for number in unknown:
            loaded.namespaces[number].is_recorded = True
        for run in runs:
            loaded.add_run(run)

    # -- into the catalog

    def _adopt(self, loaded: Loaded, table: PageTable) -> None:
        catalog, space = self._catalog, self._space
        with catalog.lock:
            catalog.next_segment = max(catalog.next_segment, loaded.next_segment)
            for file in loaded.condemned:
                space.add_condemned(file)
            if catalog.generation:
                # Cleared while it was being loaded.
                catalog.generation += loaded.generation
                for segment in loaded.segments.values():
                    space.add_condemned(
                        Condemned(segment.number, segment.record_bytes, segment.slots)
                    )
                catalog.emptied.update(catalog.namespaces)
                return
            catalog.generation = loaded.generation
            catalog.clock = max(catalog.clock, loaded.clock)
            catalog.segments = loaded.segments
            catalog.table = table
            for number, entries in catalog.namespaces.items():
                catalog.count_stored(entries, loaded.n_pages.get(number, 0))
            for segment in loaded.segments.values():
                space.add_loaded(segment)
                is_full = segment.state is SegmentState.SEALED
                if is_full and loaded.n_runs.get(segment.number, 0) > _FEW_RUNS:
                    space.to_pack.append(segment)

    def _delete_strays(self, loaded: Loaded) -> None:
        """Files that a crash left between creation and their row in the index."""
        known = loaded.left_alone | {file.number for file in loaded.condemned}
        known.update(loaded.segments)
        for path in segment_paths(self._files.directory):
            number = int(path.stem)
            with self._catalog.lock:
                self._catalog.next_segment = max(self._catalog.next_segment, number + 1)
            if number not in known:
                path.unlink()


def _or_next(generation: int | None, found: list[int]) -> int:
    """The generation that counts; if nobody knows it, one in which nothing was made."""
    if generation is not None:
        return generation
    return (max(found, default=0) + 1) & MAX_GENERATION


def fate_of(aside: Path | None) -> str:
    """What became of a damaged index, in words."""
    return "deleted for want of room" if aside is None else f"set aside as {aside.name}"


@contextlib.contextmanager
def _collector_off() -> Iterator[None]:
    """Rows pass by as tuples, none of them garbage."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
