"""The ages of the pages of all segments that may be reclaimed, side by side.

Twenty thousand segments are weighed in a millisecond: in Python alone that would take fifty, in
which threads that want to read and write would have to wait for the interpreter again and again.
"""

from __future__ import annotations

from array import array
from contextlib import AbstractContextManager

import numpy as np
import numpy.typing as npt

from tiered_kv.tiers.disk.ages import N_COUNTS
from tiered_kv.tiers.disk.segment import Segment

_ROWS = 1_024


class _Block:
    """Rows of so many segments."""

    def __init__(self) -> None:
        self.counts = np.zeros((_ROWS, N_COUNTS), np.int32)
        self.flat_counts = self.counts.reshape(-1).data
        """The same, for single ones: a memoryview's items are read and written much faster."""
        self.share = np.full(_ROWS, np.inf)
        """See `Segment.page_share`; infinite where there is no segment."""
        self.filled_at = np.zeros(_ROWS, np.int64)
        self.segments: list[Segment | None] = [None] * _ROWS


class SegmentBoard:
    """A segment that is added keeps its counts here until it is removed.

    Whoever changes it holds the catalog's lock. `totals` and `least` take it themselves, for one
    block at a time, which is some microseconds.
    """

    def __init__(self, lock: AbstractContextManager[object]) -> None:
        self._lock = lock
        self._blocks: list[_Block] = []
        self._vacant: list[int] = []

    def add(self, segment: Segment) -> None:
        if not self._vacant:
            first = len(self._blocks) * _ROWS
            self._blocks.append(_Block())
            self._vacant = list(range(first + _ROWS - 1, first - 1, -1))
        segment.row = self._vacant.pop()
        block, at = self._place(segment.row)
        block.counts[at] = segment.counts
        segment.keep_counts(block.flat_counts, at * N_COUNTS)
        block.filled_at[at] = segment.filled_at
        block.segments[at] = segment
        block.share[at] = segment.page_share

    def remove(self, segment: Segment) -> None:
        """Harmless if it is not there."""
        if segment.row is None:
            return
        block, at = self._place(segment.row)
        block.share[at] = np.inf
        block.segments[at] = None
        segment.keep_counts(array("i", segment.counts), 0)
        block.counts[at] = 0
        self._vacant.append(segment.row)
        segment.row = None

    def dispose(self) -> bool:
        """Give a segment's memory back; False if there is none left. Of no use after that."""
        if not self._blocks:
            return False
        segments = self._blocks[-1].segments
        if segments:
            segments.pop()
        else:
            self._blocks.pop()
        return True

    def _place(self, row: int) -> tuple[_Block, int]:
        return self._blocks[row // _ROWS], row % _ROWS

    def pass_epoch(self, place: int) -> None:
        """See `Segment.pass_epoch`, for all at once."""
        for block in self._blocks:
            block.counts[:, -1] += block.counts[:, place]
            block.counts[:, place] = 0

    @property
    def is_empty(self) -> bool:
        return len(self._vacant) == len(self._blocks) * _ROWS

    def totals(self) -> npt.NDArray[np.int64]:
        """Pages of each age, of all segments."""
        total = np.zeros(N_COUNTS, np.int64)
        for block in list(self._blocks):
            with self._lock:
                total += block.counts.sum(axis=0)
        return total

    def least(self, worth: npt.NDArray[np.float64]) -> tuple[float, int, int, Segment] | None:
        """The segment with the least value per byte, where `worth` is that of a page by age; of
        equals the one filled longest ago. As (value, when it was filled, number, segment)."""
        found = [least for block in list(self._blocks) if (least := self._least_of(block, worth))]
        return min(found, key=lambda each: each[:3], default=None)

    def _least_of(
        self, block: _Block, worth: npt.NDArray[np.float64]
    ) -> tuple[float, int, int, Segment] | None:
        with self._lock:
            # An empty segment is worth nothing at all, rather than nothing times infinity.
            values = (block.counts @ worth + np.finfo(np.float64).tiny) * block.share
            equal = np.flatnonzero(values == values.min())
            at = int(equal[np.argmin(block.filled_at[equal])])
            segment = block.segments[at]
            if segment is None:
                return None
            return float(values[at]), segment.filled_at, segment.number, segment
