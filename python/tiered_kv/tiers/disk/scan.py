"""Reads the headers of segment files without an index: for rebuilding one."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from tiered_kv.tiers.alignment import round_up
from tiered_kv.tiers.disk.faults import Blame, blame_of
from tiered_kv.tiers.disk.io_pool import DaemonThreads
from tiered_kv.tiers.disk.record import (
    BLOCK_BYTES,
    RecordHeader,
    SegmentHeader,
    unpack_record,
    unpack_segment,
)
from tiered_kv.tiers.disk.segment import MAX_SLOTS
from tiered_kv.tiers.disk.segment_files import segment_paths

logger = logging.getLogger(__name__)

_PROGRESS_S = 5.0
_THREADS = 16
"""Files read at a time: a header is one small read, and a disk wants many of those at once."""


@dataclass(frozen=True, slots=True)
class ScannedSegment:
    """A segment file whose size agrees with its header, and the intact record headers in it.

    Payloads are not read here: each is verified when it is asked for.
    """

    header: SegmentHeader
    records: list[tuple[int, RecordHeader]]


def found_generations(directory: Path) -> set[int]:
    """Those in which the segment files were made, as far as their headers can be read.

    Raises OSError where the fault isn't a file's.
    """
    found = set()
    for path in segment_paths(directory):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            if blame_of(error) in (Blame.PROCESS, Blame.STATE):
                raise
            continue
        try:
            header = unpack_segment(_read_block(fd, 0))
        finally:
            os.close(fd)
        if header is not None:
            found.add(header.generation)
    return found


def scan_segments(directory: Path) -> Iterator[ScannedSegment]:
    """Every usable segment file, by number; one that cannot be read or makes no sense is skipped.

    Raises OSError where the fault isn't the file's: what is skipped here is given up.
    """
    paths = segment_paths(directory)
    logged = time.monotonic()
    rest = iter(paths)
    with contextlib.closing(DaemonThreads(_THREADS, "tiered-kv-disk-scan")) as pool:
        # Not all at once: what is found waits in memory until it is taken.
        ahead: deque[tuple[Path, Future[ScannedSegment | None]]] = deque(
            (path, pool.submit(functools.partial(_scan_file, path)))
            for path in itertools.islice(rest, 2 * _THREADS)
        )
        for n_done in range(len(paths)):
            path, future = ahead.popleft()
            for another in itertools.islice(rest, 1):
                ahead.append((another, pool.submit(functools.partial(_scan_file, another))))
            if time.monotonic() - logged > _PROGRESS_S:
                logged = time.monotonic()
                logger.warning("Disk tier: scanned %d of %d segment files.", n_done, len(paths))
            try:
                scanned = future.result()
            except OSError as error:
                if blame_of(error) in (Blame.PROCESS, Blame.STATE):
                    raise
                logger.warning("Disk tier: segment file %s is skipped (%s).", path.name, error)
                continue
            if scanned is not None:
                yield scanned


def _scan_file(path: Path) -> ScannedSegment | None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # Headers lie far apart: reading ahead would read the payloads too.
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        file_bytes = os.fstat(fd).st_size
        number = int(path.stem)
        header = unpack_segment(_read_block(fd, 0))
        if header is None or header.number != number:
            header = _guess_header(fd, number, file_bytes)
        if header is None or BLOCK_BYTES + header.slots * header.record_bytes != file_bytes:
            return None
        records = []
        for slot in range(header.slots):
            offset = BLOCK_BYTES + slot * header.record_bytes
            record = unpack_record(_read_block(fd, offset))
            if record is not None and _record_bytes(record) == header.record_bytes:
                records.append((slot, record))
        return ScannedSegment(header, records)
    finally:
        os.close(fd)


def _read_block(fd: int, offset: int) -> bytes:
    """What is there, or nothing if it cannot be read: one bad block costs no other."""
    try:
        return os.pread(fd, BLOCK_BYTES, offset)
    except OSError as error:
        if blame_of(error) is not Blame.MEDIUM:
            raise
        return b""


def _record_bytes(record: RecordHeader) -> int:
    return BLOCK_BYTES + round_up(record.payload_bytes)


def _guess_header(fd: int, number: int, file_bytes: int) -> SegmentHeader | None:
    """With the segment's header gone, the first intact record tells the size of all of them."""
    for offset in range(BLOCK_BYTES, file_bytes, BLOCK_BYTES):
        record = unpack_record(_read_block(fd, offset))
        if record is not None:
            record_bytes = _record_bytes(record)
            slots = (file_bytes - BLOCK_BYTES) // record_bytes
            if (offset - BLOCK_BYTES) % record_bytes == 0 and 0 < slots <= MAX_SLOTS:
                return SegmentHeader(number, record_bytes, slots)
            return None
    return None
