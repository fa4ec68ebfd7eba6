"""What segment files there are and cost: those that are free, and those that are to be deleted.

No I/O is done here. All state is guarded by the catalog's lock, which the caller holds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container
from typing import NamedTuple

from tiered_kv.core.errors import DiskTierError
from tiered_kv.tiers.disk.budget import Budget
from tiered_kv.tiers.disk.catalog import Cleared
from tiered_kv.tiers.disk.segment import Segment


class Geometry(NamedTuple):
    """What new segments of one record size are like."""

    slots: int
    cost_bytes: int
    n_spare: int
    """How many should be free ahead of need."""


class Condemned(NamedTuple):
    """A segment file that is to be deleted."""

    number: int
    record_bytes: int
    slots: int


class FileLedger:
    """Keeps the files within the budget."""

    def __init__(self, budget: Budget, other_bytes: int) -> None:
        self.other_bytes = other_bytes
        """Taken from the budget by files that are not ours to reuse."""
        self.file_bytes = 0
        """Of all segment files."""
        self._budget = budget
        self._used_bytes = 0
        self._geometries: dict[int, Geometry] = {}
        self._free: dict[tuple[int, int], list[Segment]] = {}
        self._condemned: deque[Condemned] = deque()
        # All that there was when the store was cleared: too much to look at there and then.
        self._cleared: list[Cleared] = []

    def geometry(self, record_bytes: int) -> Geometry:
        """No slots, and more than the budget, if two segments of this size don't fit."""
        found = self._geometries.get(record_bytes)
        if found is None:
            try:
                slots = self._budget.slots_per_segment(record_bytes)
                cost = self._budget.cost(record_bytes, slots)
                found = Geometry(slots, cost, self._budget.spare_segments(record_bytes))
            except DiskTierError:  # Pages of an earlier run with a larger budget.
                found = Geometry(0, self._budget.capacity_bytes, 0)
            self._geometries[record_bytes] = found
        return found

    # -- bytes

    def charge(self, record_bytes: int, slots: int, *, times: int = 1) -> None:
        """A file is there; `times` -1: it is not there any more."""
        self._used_bytes += times * self._budget.cost(record_bytes, slots)
        self.file_bytes += times * Segment.file_size(record_bytes, slots)

    def fits(self, cost_bytes: int) -> bool:
        """Is there room for a file of this cost?"""
        return self.other_bytes + self._used_bytes + cost_bytes <= self._budget.segment_space

    def fits_new(self, record_bytes: int) -> bool:
        return self.fits(self.geometry(record_bytes).cost_bytes)

    # -- free segments

    def free(self, record_bytes: int) -> list[Segment]:
        """Those that the next pages of this record size could go to; the last is taken first."""
        return self._free.setdefault((record_bytes, self.geometry(record_bytes).slots), [])

    def add_free(self, segment: Segment) -> None:
        self._free.setdefault((segment.record_bytes, segment.slots), []).append(segment)

    def remove_free(self, segment: Segment) -> None:
        """Harmless if it is not free."""
        others = self._free.get((segment.record_bytes, segment.slots), [])
        if segment in others:
            others.remove(segment)

    def take_useless(self, kept: Container[int]) -> Segment | None:
        """A free segment to delete; not one that pages of the record sizes `kept` could go to."""
        for (record_bytes, slots), free in self._free.items():
            is_kept = record_bytes in kept and slots == self.geometry(record_bytes).slots
            if free and not is_kept:
                return free.pop()
        return None

    # -- files to delete

    def condemn(self, segment: Segment) -> None:
        self.add_condemned(Condemned(segment.number, segment.record_bytes, segment.slots))

    def add_condemned(self, file: Condemned) -> None:
        self._condemned.append(file)

    def next_condemned(self) -> Condemned | None:
        """The next file to delete, which is not condemned any more."""
        for cleared in self._cleared:
            if not self._condemned and cleared.segments:
                self.condemn(cleared.segments.popitem()[1])
        return self._condemned.popleft() if self._condemned else None

    def clear(self, cleared: Cleared) -> None:
        """All that there was is to be deleted."""
        self._free.clear()
        self._cleared.append(cleared)

    def take_disposed(self) -> Cleared | None:
        """What is left of a cleared store whose files are deleted."""
        return self._cleared.pop(0) if self._cleared and not self._cleared[0].segments else None
