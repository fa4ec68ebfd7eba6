"""One segment file as the process sees it: which page is in which slot, and how lately used."""

from __future__ import annotations

import enum
from array import array
from collections.abc import Sequence
from pathlib import Path

from tiered_kv.tiers.disk.record import BLOCK_BYTES, SegmentHeader

RESERVED_FRACTION = 0.25
"""Share of a segment that is kept for the survivors of the next reclaim: at most so many pages are
carried over, which bounds write amplification to 4/3."""

SLOT_BITS = 24
MAX_SLOTS = 1 << SLOT_BITS
_SLOT_MASK = MAX_SLOTS - 1


def location(number: int, slot: int) -> int:
    """One integer for (segment number, slot): the value of the page dicts, the key of the index."""
    return number << SLOT_BITS | slot


def segment_of(loc: int) -> int:
    return loc >> SLOT_BITS


def slot_of(loc: int) -> int:
    return loc & _SLOT_MASK


def reserved_slots(slots: int) -> int:
    """Slots at the end of a segment that wait for survivors."""
    return int(slots * RESERVED_FRACTION)


class SegmentState(enum.Enum):
    """Life of a segment file."""

    FILLING = enum.auto()
    """New records are appended."""
    SEALED = enum.auto()
    """Full; may be chosen for reclaim."""
    RECLAIMING = enum.auto()
    """Its pages are being moved on or given up; reads still work."""
    FREE = enum.auto()
    """Holds no pages; the file waits for reuse."""
    DELETED = enum.auto()
    """The file is gone; a late reader or writer of it must not count."""


class Segment:
    """Slots of one file. Guarded by the catalog's lock, except `record_offset`.

    `access[slot]` packs (logical time of last use) << 1 | (was read since written or moved): the
    low bit is the second chance of the clock algorithm. 0 means that the slot holds no page.
    """

    __slots__ = (
        "access",
        "fds",
        "live",
        "next_slot",
        "number",
        "owners",
        "page_hashes",
        "path",
        "readers",
        "record_bytes",
        "reserved",
        "slots",
        "state",
        "touched",
        "writers",
    )

    def __init__(self, number: int, path: Path, record_bytes: int, slots: int) -> None:
        self.number = number
        self.path = path
        self.record_bytes = record_bytes
        self.slots = slots
        self.state = SegmentState.FILLING
        self.fds: dict[bool, int] = {}
        self.page_hashes: list[bytes | None] = [None] * slots
        self.owners = array("I", bytes(4 * slots))
        self.access = array("Q", bytes(8 * slots))
        self.next_slot = 0
        self.reserved = reserved_slots(slots)
        self.live = 0
        self.readers = 0
        self.writers = 0
        self.touched = False

    @property
    def file_bytes(self) -> int:
        return BLOCK_BYTES + self.slots * self.record_bytes

    @property
    def header(self) -> SegmentHeader:
        return SegmentHeader(self.number, self.record_bytes, self.slots)

    @property
    def free_slots(self) -> int:
        return self.slots - self.next_slot

    def record_offset(self, slot: int) -> int:
        return BLOCK_BYTES + slot * self.record_bytes

    def put(self, slot: int, owner: int, page_hash: bytes, access: int) -> None:
        self.page_hashes[slot] = page_hash
        self.owners[slot] = owner
        self.access[slot] = access
        self.live += 1
        if slot >= self.next_slot:
            self.next_slot = slot + 1

    def put_adjacent(
        self, first: int, owner: int, page_hashes: Sequence[bytes], accesses: Sequence[int]
    ) -> None:
        """`put` for slots from `first` on that hold nothing yet."""
        end = first + len(page_hashes)
        access = array("Q", accesses)
        self.owners[first:end] = array("I", [owner]) * len(page_hashes)
        self.access[first:end] = access
        self.page_hashes[first:end] = page_hashes
        self.live += len(page_hashes)
        self.next_slot = max(self.next_slot, end)

    def drop(self, slot: int) -> None:
        self.page_hashes[slot] = None
        self.access[slot] = 0
        self.live -= 1

    def touch(self, slot: int, clock: int) -> None:
        """Note a read at logical time `clock`."""
        self.access[slot] = clock << 1 | 1
        self.touched = True

    def access_rows(self) -> list[tuple[int, int, bytes]]:
        """(access, location, page hash) of every live page."""
        return [
            (self.access[slot], location(self.number, slot), page_hash)
            for slot, page_hash in enumerate(self.page_hashes)
            if page_hash is not None
        ]

    def reset(self) -> None:
        """Forget every page: the file is about to be filled anew."""
        slots = self.slots
        self.page_hashes = [None] * slots
        self.access = array("Q", bytes(8 * slots))
        self.next_slot = 0
        self.reserved = reserved_slots(slots)
        self.live = 0
        self.touched = False
        self.state = SegmentState.FILLING
