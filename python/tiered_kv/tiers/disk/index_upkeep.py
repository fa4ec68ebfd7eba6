"""What keeps the index small, quick to load and up to date: small steps of the keeper's."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tiered_kv.tiers.disk.catalog import Catalog
from tiered_kv.tiers.disk.index import PageIndex, SegmentRow
from tiered_kv.tiers.disk.segment import Segment, SegmentState
from tiered_kv.tiers.disk.space import SpaceManager

COMPLETE_META = "complete"
"""Set in an index that knows every page: not before a rebuild is through."""
CAPACITY_META = "capacity_bytes"
"""Name under which the index remembers the budget of the last run."""

SAVE_S = 60.0
"""So much of the order of use is lost by `kill -9`."""
_SEGMENTS_PER_COMMIT = 128
_BLOCKS_PER_STEP = 32
"""Given back at a time: a large index takes 0.3 ms for each, in which nothing is acknowledged."""
_FEW_BLOCKS = 16
_UNUSED_SHARE = 0.25
"""Unused blocks are given back when they are more than this share of the index, and not few."""


class IndexUpkeep:
    """Used by one thread, but `mend`. Methods raise sqlite3.Error or OSError."""

    def __init__(
        self,
        catalog: Catalog,
        index: PageIndex,
        space: SpaceManager,
        *,
        capacity_bytes: int,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._catalog = catalog
        self._index = index
        self._space = space
        self._capacity_bytes = capacity_bytes
        self._now = now
        self.next_save_at = now() + SAVE_S
        # None: the index knows all that memory does.
        self._to_refill: list[Segment] | None = None
        self._saving: Iterator[Segment] = iter(())
        self._is_giving_back = False

    # -- steps: each does a little, and says whether there was anything to do

    def refill(self) -> bool:
        """Write a segment of a store whose index was damaged, see `mend`."""
        if self._to_refill is None:
            return False
        if self._to_refill:
            segment = self._to_refill.pop()
            with self._index.lock:
                with self._catalog.lock:
                    if not self._catalog.is_current(segment):
                        return True
                    row = SegmentRow(
                        segment.number,
                        segment.record_bytes,
                        segment.slots,
                        self._catalog.generation,
                    )
                    runs = segment.runs()
                self._index.put_segment(row)
                self._index.replace_runs(segment.number, runs)
            return True
        self._index.set_meta(CAPACITY_META, self._capacity_bytes)
        self._index.set_meta(COMPLETE_META, 1)
        self._to_refill = None
        return True

    def pack(self) -> bool:
        """Write a full segment's pages in as few rows as possible."""
        with self._catalog.lock:
            if not self._space.to_pack:
                return False
            segment = self._space.to_pack.popleft()
        with self._index.lock:
            with self._catalog.lock:
                is_full = segment.state is SegmentState.SEALED
                runs = segment.runs() if is_full and self._catalog.is_current(segment) else None
            if runs is not None:
                self._index.replace_runs(segment.number, runs)
        return True

    def forget_namespaces(self) -> bool:
        """Of thousands of weights only those are known that have pages."""
        if not self._catalog.emptied:
            return False
        with self._index.lock:
            with self._catalog.lock:
                numbers = self._catalog.forget_empty_namespaces()
            self._index.forget_namespaces(numbers)
        return True

    def save_order_of_use(self) -> bool:
        """Save it for some segments that were read since the last time, about once a minute."""
        if self._now() >= self.next_save_at:
            self.next_save_at = self._now() + SAVE_S
            self._saving = iter(list(self._catalog.segments.values()))
        touched = list(
            itertools.islice((s for s in self._saving if s.touched), _SEGMENTS_PER_COMMIT)
        )
        if not touched:
            return False
        with self._catalog.lock:
            rows = [(*segment.recency(), segment.number) for segment in touched]
            for segment in touched:
                segment.touched = False
        try:
            self._index.save_recency(rows)
        except BaseException:
            for segment in touched:
                segment.touched = True
            raise
        return True

    def give_back(self) -> bool:
        """Give some unused blocks of the index file back to the file system."""
        unused = self._index.unused_blocks()
        if not self._is_giving_back:
            threshold = max(_FEW_BLOCKS, _UNUSED_SHARE * self._index.n_bytes / 4096)
            self._is_giving_back = unused > threshold
            return self._is_giving_back
        if unused:
            self._index.give_back(_BLOCKS_PER_STEP)
        else:
            self._index.fold_log()
            self._is_giving_back = False
        return True

    # -- at once

    def save_all(self) -> None:
        """All of the order of use, now."""
        self.next_save_at = self._now()
        while self.save_order_of_use():
            pass

    def compact(self, goes_on: Callable[[], bool]) -> None:
        """Give every unused block back, as long as `goes_on` says so."""
        self.forget_namespaces()
        while goes_on() and self._index.unused_blocks():
            self._index.give_back(_BLOCKS_PER_STEP)
        self._index.fold_log()

    def mend(self) -> Path | None:
        """Begin a fresh index in the place of a damaged one; `refill` writes what memory knows.

        Returns where the old one is now. May be called by any thread.
        """
        with self._index.lock:
            aside = self._index.start_afresh()
            with self._catalog.lock:
                namespaces = list(self._catalog.namespaces.values())
                rows = [entries.row for entries in namespaces]
                self._to_refill = list(self._catalog.segments.values())
            self._index.put_runs([], rows)
            for entries in namespaces:
                entries.is_recorded = True
        return aside
