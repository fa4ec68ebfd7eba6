"""One segment file as the process sees it: which page is in which slot, and how lately used."""

from __future__ import annotations

import enum
from array import array
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from tiered_kv.tiers.disk.ages import N_COUNTS, Ages
from tiered_kv.tiers.disk.record import BLOCK_BYTES, ID_BYTES

RESERVED_FRACTION = 0.25
"""Share of a segment that is kept for the survivors of the next reclaim: at most so many pages are
carried over, which bounds write amplification to 4/3."""

SLOT_BITS = 24
MAX_SLOTS = 1 << SLOT_BITS
_SLOT_MASK = MAX_SLOTS - 1

ACCESS_BYTES = 8
MAX_ACCESS = 1 << 62
"""No clock gets there: an index that says so is damaged."""


def location(number: int, slot: int) -> int:
    """One integer for (segment number, slot): what the page table and the index know a page by."""
    return number << SLOT_BITS | slot


def segment_of(loc: int) -> int:
    return loc >> SLOT_BITS


def slot_of(loc: int) -> int:
    return loc & _SLOT_MASK


def reserved_slots(slots: int) -> int:
    """Slots at the end of a segment that wait for survivors."""
    return int(slots * RESERVED_FRACTION)


class PageRun(NamedTuple):
    """Pages of one namespace in adjacent slots: what one row of the index says."""

    location: int
    """Of the first of them."""
    namespace: int
    hashes: bytes
    """32 bytes each."""
    accesses: bytes
    """As `Segment.access`: 8 bytes each, little-endian."""

    @property
    def n_pages(self) -> int:
        return len(self.hashes) // ID_BYTES


def runs_of(pages: Iterable[tuple[int, int, bytes, int]]) -> list[PageRun]:
    """(location, namespace, page hash, access) of pages, in order of location, as runs."""
    runs: list[PageRun] = []
    hashes: list[bytes] = []
    accesses = array("Q")
    first = owner = -1

    def end_run() -> None:
        if hashes:
            packed = np.array(accesses).astype("<u8").tobytes()
            runs.append(PageRun(first, owner, b"".join(hashes), packed))

    for loc, namespace, page_hash, access in pages:
        if not hashes or loc != first + len(hashes) or namespace != owner:
            end_run()
            first, owner, hashes, accesses = loc, namespace, [], array("Q")
        hashes.append(page_hash)
        accesses.append(access)
    end_run()
    return runs


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


class Segment:
    """Slots of one file: 44 bytes each. Guarded by the catalog's lock, except `record_offset`.

    Of what a segment holds nothing is an object of the garbage collector's (an `array`, a
    memoryview or a Path would be): its full passes stop the process, and the longer the more of
    them there are.

    `access[slot]` packs (logical time of last use) << 1 | (was read since written or moved): the
    low bit is the second chance of the clock algorithm. 0 means that the slot holds no page.
    """

    __slots__ = (
        "_ages",
        "_counts",
        "_counts_at",
        "access",
        "filled_at",
        "hashes",
        "live",
        "next_slot",
        "number",
        "owners",
        "record_bytes",
        "reserved",
        "row",
        "slots",
        "state",
        "touched",
        "writers",
    )

    def __init__(self, number: int, record_bytes: int, slots: int, ages: Ages) -> None:
        self._ages = ages
        self.number = number
        self.record_bytes = record_bytes
        self.slots = slots
        self.writers = 0
        self.row: int | None = None
        """Where it is on the `SegmentBoard`, if it is."""
        self.filled_at = 0
        """Bytes that the whole store had allocated when a slot was last taken here."""
        self.reset()

    def reset(self) -> None:
        """Forget every page: the file is about to be filled anew."""
        slots = self.slots
        self.state = SegmentState.FILLING
        self.hashes = bytearray(ID_BYTES * slots)
        self.owners = np.zeros(slots, np.uint32)
        self.access = np.zeros(slots, np.uint64)
        self.next_slot = 0
        self.reserved = reserved_slots(slots)
        self.live = 0
        self.keep_counts(array("i", bytes(4 * N_COUNTS)), 0)
        self.touched = False
        """Was a page read since the order of use was saved last?"""

    @staticmethod
    def file_size(record_bytes: int, slots: int) -> int:
        return BLOCK_BYTES + slots * record_bytes

    @property
    def file_bytes(self) -> int:
        return self.file_size(self.record_bytes, self.slots)

    @property
    def page_share(self) -> float:
        """Of the file's bytes, what one page takes."""
        return self.record_bytes / self.file_bytes

    @property
    def free_slots(self) -> int:
        return self.slots - self.next_slot

    def record_offset(self, slot: int) -> int:
        return BLOCK_BYTES + slot * self.record_bytes

    def page_hash(self, slot: int) -> bytes:
        """The name of the page in a slot that holds one."""
        return bytes(self.hashes[slot * ID_BYTES : (slot + 1) * ID_BYTES])

    def owner(self, slot: int) -> int:
        """Number of the namespace of the page in a slot that holds one."""
        return self.owners.item(slot)

    def used(self, slot: int) -> int:
        """`access` of one slot."""
        return self.access.item(slot)

    @property
    def counts(self) -> list[int]:
        """Pages by the epoch in which they were used last, see `Ages`."""
        return self._counts[self._counts_at : self._counts_at + N_COUNTS].tolist()

    def keep_counts(self, table: array[int] | memoryview, first: int) -> None:
        """Count the pages in this table, from `first` on, where they are counted already."""
        self._counts, self._counts_at = table, first

    def _count(self, time: int, n_pages: int) -> None:
        self._counts[self._counts_at + self._ages.place(time)] += n_pages

    def put(self, slot: int, owner: int, page_hash: bytes, access: int) -> None:
        """A page is in this slot, which held none, from now on."""
        self.hashes[slot * ID_BYTES : (slot + 1) * ID_BYTES] = page_hash
        self.owners[slot] = owner
        self.access[slot] = access
        self._count(access >> 1, 1)
        self.live += 1
        if slot >= self.next_slot:
            self.next_slot = slot + 1

    def put_run(self, run: PageRun) -> bool:
        """`put` for a run of pages; False, and nothing is done, if it makes no sense here.

        `recount` must follow.
        """
        first, n = slot_of(run.location), run.n_pages
        end = first + n
        accesses = np.frombuffer(run.accesses, "<u8")
        if (
            not 0 < n == len(accesses)
            or len(run.hashes) != n * ID_BYTES
            or end > self.slots
            or not accesses.all()
            or accesses.max() >= MAX_ACCESS
            or self.access[first:end].any()
        ):
            return False
        self.hashes[first * ID_BYTES : end * ID_BYTES] = run.hashes
        self.owners[first:end] = run.namespace
        self.access[first:end] = accesses
        self.live += n
        self.next_slot = max(self.next_slot, end)
        return True

    def drop(self, slot: int) -> None:
        """The page in this slot is gone."""
        self._count(self.used(slot) >> 1, -1)
        self.access[slot] = 0
        self.live -= 1

    def touch(self, slot: int, clock: int) -> None:
        """Note a read at logical time `clock`."""
        self._count(self.used(slot) >> 1, -1)
        self._count(clock, 1)
        self.access[slot] = clock << 1 | 1
        self.touched = True

    def recount(self) -> None:
        """Count the pages by age anew."""
        places = self._ages.places(self.access[self.access > 0] >> np.uint64(1))
        counts = np.bincount(places, minlength=N_COUNTS)
        table = memoryview(self._counts)
        table[self._counts_at : self._counts_at + N_COUNTS] = counts.astype(np.int32).data

    def pass_epoch(self, place: int) -> None:
        """What is counted at this place is not told apart any more, see `Ages.begin_epoch`."""
        first = self._counts_at
        self._counts[first + N_COUNTS - 1] += self._counts[first + place]
        self._counts[first + place] = 0

    def live_slots(self) -> list[int]:
        """Slots that hold a page, in order."""
        slots: list[int] = np.flatnonzero(self.access).tolist()
        return slots

    def runs(self) -> list[PageRun]:
        """Every page, in as few runs as possible."""
        access, owners = self.access, self.owners
        slots = np.flatnonzero(access)
        if not len(slots):
            return []
        is_cut = (np.diff(slots) != 1) | (np.diff(owners[slots].astype(np.int64)) != 0)
        starts = slots[np.concatenate(([True], is_cut))].tolist()
        ends = (slots[np.concatenate((is_cut, [True]))] + 1).tolist()
        return [
            PageRun(
                location(self.number, start),
                int(owners[start]),
                bytes(self.hashes[start * ID_BYTES : end * ID_BYTES]),
                access[start:end].astype("<u8").tobytes(),
            )
            for start, end in zip(starts, ends, strict=True)
        ]

    # -- the order of use, as it is saved

    def recency(self) -> tuple[int, bytes]:
        """When a page was last used here, and a bit per slot: was it read since it was written?"""
        was_read = (self.access & np.uint64(1)).astype(bool)
        return int(self.access.max()) >> 1, np.packbits(was_read).tobytes()

    def restore_recency(self, newest: int, was_read: bytes) -> None:
        """Pages that were read count as used at `newest`: the bits say which, not when.

        `recount` must follow.
        """
        if not 0 < newest < MAX_ACCESS >> 1:
            return
        bits = np.unpackbits(np.frombuffer(was_read, np.uint8), count=self.slots).astype(bool)
        self.access[bits & (self.access > 0)] = newest << 1 | 1
