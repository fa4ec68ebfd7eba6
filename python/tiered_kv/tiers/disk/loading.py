"""Start-up: the index into memory, or, if the index is damaged, the segments' headers into both.

What is found is collected apart, and takes its place in the catalog in one step.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tiered_kv.tiers.disk.faults import Blame, blame_of, is_damage
from tiered_kv.tiers.disk.frozen_index import FrozenIndex
from tiered_kv.tiers.disk.generation import read_generation
from tiered_kv.tiers.disk.index import PageIndex, SegmentRow, set_index_aside
from tiered_kv.tiers.disk.index_upkeep import COMPLETE_META
from tiered_kv.tiers.disk.loaded import IsWhole, Loaded
from tiered_kv.tiers.disk.record import BLOCK_BYTES
from tiered_kv.tiers.disk.scan import ScannedSegment, found_generations, scan_segments
from tiered_kv.tiers.disk.segment import MAX_SLOTS, Segment, location, runs_of
from tiered_kv.tiers.disk.segment_files import SegmentFiles, segment_paths

logger = logging.getLogger(__name__)

_ODD_ERRORS = (sqlite3.Error, TypeError, ValueError, OverflowError)
"""What a damaged index may raise when it is loaded."""


def open_index(
    directory: Path,
    files: SegmentFiles,
    make_index: Callable[[], PageIndex],
    has_room: Callable[[int], bool],
    is_whole: IsWhole,
) -> tuple[PageIndex, Loaded]:
    """Open the index and load it; if it is damaged, set it aside and rebuild it.

    has_room: may a damaged index of this size be kept? is_whole: asked of pages that are found
    twice, may raise OSError.
    Raises sqlite3.Error or OSError if a fresh index cannot be written either.
    """
    generation = read_generation(directory)
    segment_paths(files.directory)  # Without them nothing can be said of the index: raises OSError.
    index = None
    try:
        index = make_index()
        loaded = _load(index, files, generation)
        for number in loaded.lost:
            index.forget_segment(number)
        _delete_strays(files, loaded)
        index.set_meta(COMPLETE_META, 1)
        return index, loaded
    except Exception as error:
        is_broken = isinstance(error, _ODD_ERRORS) and is_damage(error, at_open=True)
        if index is not None:
            index.close()
        elif isinstance(error, OSError):
            is_broken = blame_of(error) is Blame.MEDIUM
        if not is_broken:
            raise
        aside = set_index_aside(directory, has_room)
        logger.warning(
            "The disk tier's index in %s is damaged (%s): %s, rebuilding it from the segment "
            "files.",
            directory,
            error,
            fate_of(aside),
        )
    index = make_index()
    try:
        return index, _rebuild(index, files, generation, is_whole)
    except BaseException:
        index.close()
        raise


def open_frozen_index(directory: Path, files: SegmentFiles) -> tuple[PageIndex, Loaded]:
    """Load the index of a directory in which nothing can be written, and change nothing.

    Raises sqlite3.Error, ValueError or OSError if it cannot be read, or not be trusted.
    """
    index = FrozenIndex(directory)
    try:
        return index, _load(index, files, read_generation(directory))
    except BaseException:
        index.close()
        raise


def fate_of(aside: Path | None) -> str:
    """What became of a damaged index, in words."""
    return "deleted for want of room" if aside is None else f"set aside as {aside.name}"


# -- from the index


def _load(index: PageIndex, files: SegmentFiles, generation: int | None) -> Loaded:
    """Raises sqlite3.Error, TypeError, ValueError or OverflowError if the index is damaged."""
    index.check()
    if not index.meta(COMPLETE_META) and any(segment_paths(files.directory)):
        raise ValueError("it was never completed, or is new although there are segments")
    rows = index.segments()
    if generation is not None and any(row.generation > generation for row in rows):
        raise ValueError("it knows of a clear that its directory does not")
    loaded = Loaded(generation, (row.generation for row in rows))
    for namespace in index.namespaces():
        loaded.add_namespace(namespace)
    for row in rows:
        _load_segment(files, loaded, row)
    with _collector_off():
        for run in index.runs():
            loaded.add_run(run)
    for row in rows:
        if row.number in loaded.segments:
            loaded.segments[row.number].restore_recency(row.newest, row.was_read)
    loaded.settle()
    if loaded.lost:
        logger.warning(
            "Disk tier: %d segment files are missing or have the wrong size; their pages are "
            "forgotten.",
            len(loaded.lost),
        )
    return loaded


def _load_segment(files: SegmentFiles, loaded: Loaded, row: SegmentRow) -> None:
    is_possible = 0 < row.slots <= MAX_SLOTS and row.record_bytes > BLOCK_BYTES
    path = files.path(row.number)
    n_bytes = Segment.file_size(row.record_bytes, row.slots)
    if not (is_possible and files.has_size(path, n_bytes)):
        loaded.add_lost(row.number)
    else:
        loaded.add_segment(row)


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


# -- from the segments


def _rebuild(
    index: PageIndex, files: SegmentFiles, generation: int | None, is_whole: IsWhole
) -> Loaded:
    started = time.monotonic()
    loaded = Loaded(generation, found_generations(files.directory))
    for scanned in scan_segments(files.directory):
        _add_scanned(index, loaded, scanned)
    # Before the index counts as complete: the next start would take what is newer, but torn.
    index.delete_pages(loaded.settle(is_whole))
    _delete_strays(files, loaded)
    index.set_meta(COMPLETE_META, 1)
    logger.warning(
        "Disk tier: index rebuilt in %.1f s, %d pages in %d segments.",
        time.monotonic() - started,
        sum(loaded.n_pages.values()),
        len(loaded.segments),
    )
    return loaded


def _add_scanned(index: PageIndex, loaded: Loaded, scanned: ScannedSegment) -> None:
    header = scanned.header
    row = SegmentRow(header.number, header.record_bytes, header.slots, header.generation)
    loaded.add_segment(row)
    index.put_segment(row)
    if header.number not in loaded.segments:
        return
    pages = []
    unknown = []
    for slot, record in scanned.records:
        entries, is_new = loaded.namespace_of(record.namespace_id, record.payload_bytes)
        if is_new:
            unknown.append(entries.row)
        if entries.page_bytes == record.payload_bytes:
            loc = location(header.number, slot)
            pages.append((loc, entries.number, record.page_hash, max(record.sequence, 1) << 1))
    runs = runs_of(pages)
    index.put_runs(runs, unknown)
    for run in runs:
        loaded.add_run(run)


# -- both


def _delete_strays(files: SegmentFiles, loaded: Loaded) -> None:
    """Files that a crash left between creation and their row in the index."""
    known = {file.number for file in loaded.condemned} | loaded.segments.keys()
    for path in segment_paths(files.directory):
        number = int(path.stem)
        loaded.next_segment = max(loaded.next_segment, number + 1)
        if number not in known:
            try:
                path.unlink()
            except OSError as error:
                logger.warning("Disk tier: %s, of no use, cannot be deleted (%s).", path, error)
