"""Start-up: the index into memory, or, if the index is damaged, the segments' headers into both."""

from __future__ import annotations

import bisect
import contextlib
import gc
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tiered_kv.tiers.disk.catalog import Catalog, NamespaceEntries
from tiered_kv.tiers.disk.faults import is_damage
from tiered_kv.tiers.disk.frozen_index import FrozenIndex
from tiered_kv.tiers.disk.index import (
    PageIndex,
    PageRow,
    SegmentRow,
    set_index_aside,
)
from tiered_kv.tiers.disk.record import BLOCK_BYTES, ID_BYTES, RecordHeader
from tiered_kv.tiers.disk.scan import ScannedSegment, scan_segments
from tiered_kv.tiers.disk.segment import (
    MAX_SLOTS,
    Segment,
    SegmentState,
    location,
    segment_of,
    slot_of,
)
from tiered_kv.tiers.disk.segment_files import SegmentFiles, segment_paths

logger = logging.getLogger(__name__)

_COMMIT_ROWS = 10_000
_ODD_ERRORS = (sqlite3.Error, TypeError, ValueError, OverflowError)
"""What a damaged index may raise when it is loaded."""
_COMPLETE = "complete"
"""Set in an index that knows every page: not before a rebuild is through."""


def open_index(
    directory: Path,
    files: SegmentFiles,
    make_index: Callable[[], PageIndex],
    has_room: Callable[[int], bool],
) -> tuple[PageIndex, Catalog]:
    """Open the index and load it; if it is damaged, set it aside and rebuild it.

    has_room: may a damaged index of this size be kept?
    Raises sqlite3.Error or OSError if a fresh index cannot be written either.
    """
    index = None
    try:
        index = make_index()
        catalog, lost = _load(index, files)
        for number in lost:
            index.replace_segment(number, [], forget=True)
        _delete_strays(files, catalog)
        index.set_meta(_COMPLETE, 1)
        return index, catalog
    except Exception as error:
        if index is not None:
            index.close()
        if not (isinstance(error, _ODD_ERRORS) and is_damage(error, at_open=True)):
            raise
        aside = set_index_aside(directory, has_room)
        logger.warning(
            "The disk tier's index in %s is damaged (%s): %s, rebuilding it from the segment "
            "files.",
            directory,
            error,
            _fate(aside),
        )
    index = make_index()
    return index, _rebuild(index, files)


def open_frozen_index(directory: Path, files: SegmentFiles) -> tuple[PageIndex, Catalog]:
    """Load the index of a directory in which nothing can be written, and change nothing.

    Raises sqlite3.Error, ValueError or OSError if it cannot be read, or not be trusted.
    """
    index = FrozenIndex(directory)
    try:
        catalog, _ = _load(index, files)
    except BaseException:
        index.close()
        raise
    return index, catalog


@contextlib.contextmanager
def _collector_off() -> Iterator[None]:
    """A million rows pass by as tuples, none of them garbage: a quarter of the time went there."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _load(index: PageIndex, files: SegmentFiles) -> tuple[Catalog, list[int]]:
    """Returns also the numbers of segments whose file is not as the index says.

    Raises sqlite3.Error, TypeError, ValueError or OverflowError if the index is damaged.
    """
    index.check()
    if not index.meta(_COMPLETE) and any(segment_paths(files.directory)):
        raise ValueError("it was never completed, or is new although there are segments")
    catalog = Catalog()
    for ns in index.namespaces():
        entries = catalog.namespaces[ns.number] = NamespaceEntries(*ns)
        entries.is_recorded = True
    with _collector_off():
        lost = _load_segments(index, files, catalog)
        for rows in index.page_batches():
            _load_pages(catalog, rows)
    for segment in catalog.segments.values():
        _set_loaded_state(segment)
    if lost:
        logger.warning(
            "Disk tier: %d segment files are missing or have the wrong size; their pages are "
            "forgotten.",
            len(lost),
        )
    return catalog, lost


def _load_segments(index: PageIndex, files: SegmentFiles, catalog: Catalog) -> list[int]:
    lost: list[int] = []
    for row in index.segments():
        catalog.next_segment = max(catalog.next_segment, row.number + 1)
        path = files.path(row.number)
        if _is_file_of(files, row):
            catalog.segments[row.number] = Segment(row.number, path, row.record_bytes, row.slots)
        else:
            lost.append(row.number)
    return lost


def _is_file_of(files: SegmentFiles, row: SegmentRow) -> bool:
    """Does the file have exactly the size of a segment of this geometry?"""
    if not (0 < row.slots <= MAX_SLOTS and row.record_bytes > BLOCK_BYTES):
        return False
    return files.has_size(files.path(row.number), BLOCK_BYTES + row.slots * row.record_bytes)


def _load_pages(catalog: Catalog, rows: list[tuple[int, int, bytes, int]]) -> None:
    """Rows in order of location. The usual case runs in bulk: a million rows must load fast."""
    start = 0
    while start < len(rows):
        number = segment_of(rows[start][0])
        end = bisect.bisect_left(rows, (location(number + 1, 0),), start)
        segment = catalog.segments.get(number)
        if segment is not None and not _load_in_bulk(catalog, segment, rows[start:end]):
            for row in rows[start:end]:
                _load_page(catalog, segment, *row)
        start = end


def _load_in_bulk(
    catalog: Catalog, segment: Segment, rows: list[tuple[int, int, bytes, int]]
) -> bool:
    """Load rows of adjacent slots, of one namespace, none known already; False for all others."""
    locations, owners, hashes, accesses = zip(*rows, strict=True)
    entries = catalog.namespaces.get(owners[0])
    n = len(rows)
    first = slot_of(locations[0])
    is_plain = (
        entries is not None
        and entries.record_bytes == segment.record_bytes
        and locations[-1] - locations[0] == n - 1
        and first + n <= segment.slots
        and len(set(owners)) == 1
        and set(map(len, hashes)) == {ID_BYTES}
        and len(set(hashes)) == n
        and entries.locations.keys().isdisjoint(hashes)
    )
    if not is_plain or entries is None:
        return False
    segment.put_adjacent(first, owners[0], hashes, accesses)
    entries.locations.update(zip(hashes, locations, strict=True))
    catalog.clock = max(catalog.clock, (max(accesses) >> 1) + 1)
    return True


def _load_page(
    catalog: Catalog, segment: Segment, loc: int, owner: int, page_hash: bytes, access: int
) -> None:
    entries = catalog.namespaces.get(owner)
    slot = slot_of(loc)
    if entries is None or entries.record_bytes != segment.record_bytes or slot >= segment.slots:
        return
    known = catalog.locate(entries, page_hash)
    if known is None or known[0].access[known[1]] < access:
        catalog.put(entries, page_hash, segment, slot, access)
    catalog.clock = max(catalog.clock, (access >> 1) + 1)


def _set_loaded_state(segment: Segment) -> None:
    if segment.live == 0:
        segment.state = SegmentState.FREE
    elif segment.free_slots == 0:
        segment.state = SegmentState.SEALED


def _delete_strays(files: SegmentFiles, catalog: Catalog) -> None:
    """Files that a crash left between creation and their row in the index."""
    for path in segment_paths(files.directory):
        number = int(path.stem)
        catalog.next_segment = max(catalog.next_segment, number + 1)
        if number not in catalog.segments:
            try:
                files.delete(path)
            except OSError as error:
                logger.warning("Disk tier: %s, of no use, cannot be deleted (%s).", path, error)


def _rebuild(index: PageIndex, files: SegmentFiles) -> Catalog:
    catalog = Catalog()
    started = time.monotonic()
    for scanned in scan_segments(files.directory):
        _add_scanned(index, files, catalog, scanned)
    for segment in catalog.segments.values():
        _set_loaded_state(segment)
    _write_rows(index, catalog)
    _delete_strays(files, catalog)
    index.set_meta(_COMPLETE, 1)
    logger.warning(
        "Disk tier: index rebuilt in %.1f s, %d pages in %d segments.",
        time.monotonic() - started,
        catalog.n_pages(),
        len(catalog.segments),
    )
    return catalog


def _add_scanned(
    index: PageIndex, files: SegmentFiles, catalog: Catalog, scanned: ScannedSegment
) -> None:
    header = scanned.header
    segment = Segment(header.number, files.path(header.number), header.record_bytes, header.slots)
    catalog.segments[header.number] = segment
    for slot, record in scanned.records:
        entries = _namespace_of(index, catalog, record)
        if entries.record_bytes != segment.record_bytes:
            continue
        known = catalog.locate(entries, record.page_hash)
        access = record.sequence << 1
        if known is None or known[0].access[known[1]] < access:
            catalog.put(entries, record.page_hash, segment, slot, access)
        catalog.clock = max(catalog.clock, record.sequence + 1)


def _namespace_of(index: PageIndex, catalog: Catalog, record: RecordHeader) -> NamespaceEntries:
    entries = catalog.find_namespace(record.namespace_id)
    if entries is None:
        entries = NamespaceEntries(
            len(catalog.namespaces) + 1, record.namespace_id, record.payload_bytes, ""
        )
        index.put_namespace(entries.row)
        entries.is_recorded = True
        catalog.namespaces[entries.number] = entries
    return entries


def refill_index(index: PageIndex, catalog: Catalog) -> None:
    """Write a fresh index from memory, after the old one failed while in use. Never raises."""
    try:
        with index.lock:
            aside = index.start_afresh()
            for entries in list(catalog.namespaces.values()):
                index.put_namespace(entries.row)
                entries.is_recorded = True
            _write_rows(index, catalog)
            index.set_meta(_COMPLETE, 1)
        logger.warning("Disk tier: the index was damaged: %s, written anew.", _fate(aside))
    except (OSError, sqlite3.Error) as error:
        logger.warning("Disk tier: the index is damaged and cannot be written anew (%s).", error)


def _fate(aside: Path | None) -> str:
    return "deleted for want of room" if aside is None else f"set aside as {aside.name}"


def _write_rows(index: PageIndex, catalog: Catalog) -> None:
    """All segments and pages of the catalog. The caller holds the index lock, or is alone."""
    for segment in list(catalog.segments.values()):
        index.put_segment(SegmentRow(segment.number, segment.record_bytes, segment.slots))
        with catalog.lock:
            rows = [
                PageRow(loc, segment.owners[slot_of(loc)], page_hash, access)
                for access, loc, page_hash in segment.access_rows()
            ]
        for start in range(0, len(rows), _COMMIT_ROWS):
            index.put_pages(rows[start : start + _COMMIT_ROWS])
