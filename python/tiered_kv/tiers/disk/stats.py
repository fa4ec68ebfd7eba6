"""Counters of the disk tier and the frozen snapshot handed to callers."""

from __future__ import annotations

import threading
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DiskStats:
    """A snapshot. Sizes are bytes now; counters count from the moment the store was opened."""

    pages: int
    """Pages stored now."""
    bytes_used: int
    """Payload bytes of the pages stored now."""
    bytes_on_disk: int
    """Bytes of segment files plus index files now; never above `capacity`."""
    capacity: int
    """The byte budget of the directory."""
    segments: int
    """Segment files, in use or free."""
    degraded: bool
    """True while writes pause after an operating error, or the disk does not answer."""
    stalled: bool
    """True while some I/O has been under way for more than 2 s: reads are misses meanwhile."""
    direct_io: bool
    """Whether a page that is not wanted again soon bypasses the page cache now."""
    direct_io_soon: bool
    """The same for a page that is: in the mode "auto" it tells whether memory is scarce."""
    encrypted: bool
    reads: int
    """Pages read and verified."""
    read_bytes: int
    writes: int
    """Pages written and acknowledged."""
    write_bytes: int
    read_misses: int
    """Pages asked for and not delivered."""
    checksum_failures: int
    """Records found damaged; each was dropped and counted as a miss."""
    io_errors: int
    """Failed reads, writes and index commits."""
    reclaimed_segments: int
    moved_pages: int
    """Pages carried over from a reclaimed segment because they had been read lately."""
    dropped_pages: int
    """Pages given up to make room."""
    direct_read_bytes: int
    """Bytes of records read past the page cache; likewise the next three."""
    buffered_read_bytes: int
    direct_write_bytes: int
    buffered_write_bytes: int

    @classmethod
    def without_store(cls, capacity: int, counted: dict[str, int]) -> DiskStats:
        """What there is to say of a tier whose store is not open; `counted` by `Counters.NAMES`."""
        return cls(
            pages=0,
            bytes_used=0,
            bytes_on_disk=0,
            capacity=capacity,
            segments=0,
            degraded=True,
            stalled=False,
            direct_io=False,
            direct_io_soon=False,
            encrypted=False,
            **counted,
        )


class Counters:
    """Thread-safe counters behind `DiskStats`."""

    NAMES = (
        "reads",
        "read_bytes",
        "writes",
        "write_bytes",
        "read_misses",
        "checksum_failures",
        "io_errors",
        "reclaimed_segments",
        "moved_pages",
        "dropped_pages",
        "direct_read_bytes",
        "buffered_read_bytes",
        "direct_write_bytes",
        "buffered_write_bytes",
    )

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values = dict.fromkeys(self.NAMES, 0)

    def add(self, **amounts: int) -> None:
        with self._lock:
            for name, amount in amounts.items():
                self._values[name] += amount

    def snapshot(self) -> dict[str, int]:
        with self._lock:
            return dict(self._values)
