"""Which bytes of the directory may be used: allocates slots, reclaims segments, keeps the budget.

Locks are taken in the order: `SpaceManager._structure` (creating, reclaiming or deleting segments;
held across I/O) > `PageIndex.lock` > `Catalog.lock`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

from tiered_kv.tiers.disk.budget import Budget
from tiered_kv.tiers.disk.catalog import Catalog
from tiered_kv.tiers.disk.index import PageIndex, PageRow, SegmentRow
from tiered_kv.tiers.disk.page_mover import PageMover
from tiered_kv.tiers.disk.reclaim import choose_survivors, choose_victim
from tiered_kv.tiers.disk.segment import Segment, SegmentState
from tiered_kv.tiers.disk.segment_files import SegmentFiles
from tiered_kv.tiers.disk.stats import Counters

BATCH_BYTES = 128 << 20
"""Bytes written between two acknowledgements of one large batch."""


class SpaceManager:
    """Hands out slots of the segments being filled; makes room when the budget is used up."""

    def __init__(
        self,
        catalog: Catalog,
        index: PageIndex,
        files: SegmentFiles,
        mover: PageMover,
        budget: Budget,
        counters: Counters,
        *,
        other_bytes: int = 0,
    ) -> None:
        self.other_bytes = other_bytes
        """Taken from the budget by files that are not ours to reuse."""
        self._catalog = catalog
        self._index = index
        self._files = files
        self._mover = mover
        self._budget = budget
        self._counters = counters
        self._structure = threading.Lock()
        self._filling: dict[int, Segment] = {}

    # -- slots for new pages

    def pages_per_batch(self, record_bytes: int) -> int:
        """Pages to allocate at a time: slots that wait for their data cannot be reclaimed, so one
        large batch must not claim the whole budget at once."""
        return max(
            min(BATCH_BYTES // record_bytes, self._budget.slots_per_segment(record_bytes)), 1
        )

    def allocate(self, record_bytes: int, count: int) -> list[tuple[Segment, int]]:
        """Up to `count` slots, fewer if there is no room even after reclaiming.

        Every segment returned counts the slots as `writers` until `finish_writes`. Raises OSError
        or sqlite3.Error if a segment cannot be created or reclaimed.
        """
        slots: list[tuple[Segment, int]] = []
        try:
            while len(slots) < count:
                taken = self._take(record_bytes, count - len(slots))
                slots += taken
                if not taken and not self._advance(record_bytes):
                    break
        except BaseException:
            self.finish_writes(slots)
            raise
        return slots

    def finish_writes(self, slots: Iterable[tuple[Segment, int]]) -> None:
        with self._catalog.lock:
            for segment, _ in slots:
                segment.writers -= 1
                self._close_if_gone(segment)

    def unpin_readers(self, segments: Iterable[Segment]) -> None:
        with self._catalog.lock:
            for segment in segments:
                segment.readers -= 1
                self._close_if_gone(segment)

    def _take(self, record_bytes: int, count: int) -> list[tuple[Segment, int]]:
        """Slots for new pages; what is reserved for survivors is left alone."""
        with self._catalog.lock:
            segment = self._filling.get(record_bytes)
            if segment is None:
                return []
            return _take_slots(segment, min(count, segment.free_slots - segment.reserved))

    # -- segments

    def _advance(self, record_bytes: int) -> bool:
        """Give this record size a segment with free slots; False if there is no room for one."""
        with self._structure:
            if self._has_slots(record_bytes) or self._release_reserve(record_bytes):
                return True
            with self._catalog.lock:
                full = self._filling.pop(record_bytes, None)
                if full is not None:
                    full.state = SegmentState.SEALED
                if self._adopt_partial(record_bytes):
                    return True
            slots = self._budget.slots_per_segment(record_bytes)
            cost = self._budget.cost(record_bytes, slots)
            while True:
                segment = self._reuse(record_bytes, slots)
                if segment is None and self._delete_free_until(cost):
                    segment = self._create(record_bytes, slots)
                if segment is not None:
                    with self._catalog.lock:
                        self._filling[record_bytes] = segment
                    return True
                if not self._reclaim_one():
                    return False

    def _has_slots(self, record_bytes: int) -> bool:
        with self._catalog.lock:
            segment = self._filling.get(record_bytes)
            return segment is not None and segment.free_slots > segment.reserved

    def _release_reserve(self, record_bytes: int) -> bool:
        """Reclaim now, while there is still room for the survivors; the rest is for new pages.

        True if the segment being filled has free slots afterwards.
        """
        with self._catalog.lock:
            segment = self._filling.get(record_bytes)
        if segment is None or not segment.reserved:
            return False
        if not self._has_spare(record_bytes):
            self._reclaim_one(spare=segment)
        with self._catalog.lock:
            segment.reserved = 0
        return self._has_slots(record_bytes)

    def _adopt_partial(self, record_bytes: int) -> bool:
        """Go on filling a segment left partly filled by an earlier run."""
        for segment in self._catalog.segments_in(SegmentState.FILLING):
            if segment.record_bytes == record_bytes and segment.free_slots:
                self._filling[record_bytes] = segment
                return True
        return False

    def _reuse(self, record_bytes: int, slots: int) -> Segment | None:
        with self._catalog.lock:
            for segment in self._catalog.segments_in(SegmentState.FREE):
                if segment.record_bytes == record_bytes and segment.slots == slots:
                    segment.reset()
                    return segment
        return None

    def _create(self, record_bytes: int, slots: int) -> Segment:
        with self._catalog.lock:
            number = self._catalog.next_segment
            self._catalog.next_segment += 1
        segment = self._files.create(number, record_bytes, slots)
        with self._index.lock:
            try:
                self._index.put_segment(SegmentRow(number, record_bytes, slots))
            except BaseException:
                self._files.close(segment)
                self._files.delete(segment.path)
                raise
            with self._catalog.lock:
                self._catalog.segments[number] = segment
        return segment

    # -- budget

    def _used(self) -> int:
        with self._catalog.lock:
            segments = list(self._catalog.segments.values())
        return self.other_bytes + sum(self._budget.cost(s.record_bytes, s.slots) for s in segments)

    def _fits(self, cost: int) -> bool:
        return self._used() + cost <= self._budget.segment_space

    def _has_spare(self, record_bytes: int) -> bool:
        """Can a segment be had without reclaiming one?"""
        cost = self._budget.cost(record_bytes, self._budget.slots_per_segment(record_bytes))
        with self._catalog.lock:
            free = self._catalog.segments_in(SegmentState.FREE)
        return self._fits(cost - sum(self._budget.cost(s.record_bytes, s.slots) for s in free))

    def _delete_free_until(self, cost: int) -> bool:
        """True if `cost` more bytes fit, after deleting free files of other sizes as needed."""
        while not self._fits(cost):
            with self._catalog.lock:
                free = self._catalog.segments_in(SegmentState.FREE)
            if not free:
                return False
            self._delete(free[0])
        return True

    def shrink_to_budget(self) -> None:
        """Give up segments until the budget holds (it may be smaller than in an earlier run)."""
        with self._structure:
            if self._fits(0):
                return
            while not self._fits(0):
                with self._catalog.lock:
                    victim = choose_victim(
                        self._catalog.segments.values(), self._catalog.clock << 1
                    )
                if victim is None:
                    break
                self._empty(victim, [], forget=True)
            self._index.compact()

    def delete_free(self) -> int:
        """Give the files of segments without pages back; returns their bytes."""
        freed = 0
        with self._structure:
            with self._catalog.lock:
                free = self._catalog.segments_in(SegmentState.FREE)
            for segment in free:
                freed += segment.file_bytes
                self._delete(segment)
            self._index.compact()
        return freed

    # -- reclaim (the caller holds `_structure`)

    def _reclaim_one(self, spare: Segment | None = None) -> bool:
        """Turn the least valuable segment (never `spare`) into a free one; False if there is none.

        A segment with writes under way cannot be reclaimed.
        """
        with self._catalog.lock:
            idle = [s for s in self._catalog.segments_in(SegmentState.SEALED) if not s.writers]
            # Only if there is no other: one that another record size is still filling.
            filling = self._catalog.segments_in(SegmentState.FILLING)
            idle = idle or [s for s in filling if not s.writers and s is not spare]
            victim = choose_victim(idle, self._catalog.clock << 1)
            if victim is None:
                return False
            previous_state = victim.state
            victim.state = SegmentState.RECLAIMING
            if self._filling.get(victim.record_bytes) is victim:
                del self._filling[victim.record_bytes]
            target = self._filling.get(victim.record_bytes)
            survivors = choose_survivors(victim, target.free_slots if target else 0)
        try:
            moved = self._move(victim, survivors)
            self._empty(victim, moved, forget=False)
        except BaseException:
            with self._catalog.lock:
                victim.state = previous_state
            raise
        self._counters.add(reclaimed_segments=1)
        return True

    def _move(self, victim: Segment, survivors: Sequence[int]) -> list[PageRow]:
        if not survivors:
            return []
        with self._catalog.lock:
            slots = _take_slots(self._filling[victim.record_bytes], len(survivors))
        try:
            return self._mover.copy(victim, survivors, slots)
        finally:
            self.finish_writes(slots)

    def _empty(self, victim: Segment, moved: Sequence[PageRow], *, forget: bool) -> None:
        """Commit the moves, forget all other pages of the victim, free or delete its file."""
        with self._index.lock:
            self._index.replace_segment(victim.number, moved, forget=forget)
            with self._catalog.lock:
                n_moved = self._mover.rebind(victim, moved)
                n_dropped = self._catalog.drop_segment(victim)
                victim.state = SegmentState.FREE
        self._counters.add(moved_pages=n_moved, dropped_pages=n_dropped)
        if forget:
            self._remove_file(victim)

    def _delete(self, segment: Segment) -> None:
        self._index.replace_segment(segment.number, [], forget=True)
        self._remove_file(segment)

    def _remove_file(self, segment: Segment) -> None:
        self._files.delete(segment.path)
        with self._catalog.lock:
            del self._catalog.segments[segment.number]
            segment.state = SegmentState.DELETED
            self._close_if_gone(segment)

    def forget_lost(self, segment: Segment) -> int | None:
        """Give up a segment whose file is not whole; returns its pages, None if it is none of ours.

        Raises OSError if what is left of the file cannot be deleted, sqlite3.Error if the index
        cannot be written.
        """
        with self._structure:
            # It may have been deleted by us meanwhile.
            if self._catalog.segments.get(segment.number) is not segment:
                return None
            if self._files.is_whole(segment):
                return None
            with self._catalog.lock:
                n_pages = segment.live
                if self._filling.get(segment.record_bytes) is segment:
                    del self._filling[segment.record_bytes]
            self._empty(segment, [], forget=True)
            return n_pages

    def _close_if_gone(self, segment: Segment) -> None:
        if segment.state is SegmentState.DELETED and not segment.readers and not segment.writers:
            self._files.close(segment)

    def clear(self) -> None:
        """Delete every segment; pages being written meanwhile are not acknowledged."""
        with self._structure, self._index.lock:
            self._index.clear()
            with self._catalog.lock:
                segments = list(self._catalog.segments.values())
                for segment in segments:
                    self._catalog.drop_segment(segment)
                self._filling.clear()
            for segment in segments:
                self._remove_file(segment)


def _take_slots(segment: Segment, count: int) -> list[tuple[Segment, int]]:
    count = max(count, 0)
    first = segment.next_slot
    segment.next_slot += count
    segment.writers += count
    return [(segment, slot) for slot in range(first, first + count)]
