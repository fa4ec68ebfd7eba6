"""Makes, empties and deletes segments: the part of the keeper's work that makes room."""

from __future__ import annotations

import time
from collections.abc import Callable

from tiered_kv.tiers.disk.catalog import Catalog
from tiered_kv.tiers.disk.index import PageIndex, SegmentRow
from tiered_kv.tiers.disk.page_mover import PageMover
from tiered_kv.tiers.disk.reclaim import choose_survivors, choose_victim
from tiered_kv.tiers.disk.record import SegmentHeader
from tiered_kv.tiers.disk.segment import Segment
from tiered_kv.tiers.disk.segment_files import SegmentFiles
from tiered_kv.tiers.disk.space import SpaceManager
from tiered_kv.tiers.disk.stats import Counters

PATIENCE_S = 0.025
"""A writer that has waited so long gets the segment as it is: pages that would have been carried
over are given up instead."""
_LONGEST_PAUSE_S = 0.25


class Reclaimer:
    """No lock is held across I/O. Used by one thread. Methods raise OSError or sqlite3.Error."""

    def __init__(
        self,
        catalog: Catalog,
        index: PageIndex,
        files: SegmentFiles,
        space: SpaceManager,
        mover: PageMover,
        counters: Counters,
        *,
        pause: Callable[[float], None],
        save_generation: Callable[[], bool],
    ) -> None:
        """`pause` waits, or returns at once if a writer waits. `save_generation` notes on disk how
        often everything was cleared."""
        self._catalog = catalog
        self._index = index
        self._files = files
        self._space = space
        self._mover = mover
        self._counters = counters
        self._pause = pause
        self._save_generation = save_generation

    def make_room(self, record_bytes: int, *, at_once: bool) -> bool:
        """One step towards a free segment of this record size; False if nothing can be done.

        at_once: a writer waits for it.
        """
        if slots := self._space.charge_new(record_bytes):
            self._create(record_bytes, slots)
            return True
        return (
            self.delete_condemned()
            or (self._space.condemn_free(even_spares=at_once) and self.delete_condemned())
            or self._reclaim(record_bytes)
        )

    def shrink(self) -> bool:
        """One step towards the budget, which was larger in an earlier run; False if it holds."""
        if not self._space.is_over_budget():
            return False
        if self.delete_condemned():
            return True
        if self._space.condemn_free(even_spares=True) and self.delete_condemned():
            return True
        victim = self._choose_victim(record_bytes=0)
        if victim is None or not self._space.begin_reclaim(victim):
            return False
        self._empty(victim)
        return True

    def delete_condemned(self) -> bool:
        """Delete one file that is of no use any more; False if there is none."""
        file = self._space.next_condemned()
        if file is None:
            return False
        try:
            self._index.forget_segment(file.number)
            self._files.delete(file.number)
        except BaseException:
            self._space.condemn_again(file)
            raise
        self._space.forget_file(file.record_bytes, file.slots)
        return True

    def _create(self, record_bytes: int, slots: int) -> None:
        """Make a segment whose bytes are taken from the budget already."""
        with self._catalog.lock:
            number, generation = self._catalog.next_segment, self._catalog.generation
            self._catalog.next_segment += 1
        try:
            # Nothing of a new generation before it is known that the old one is over.
            self._save_generation()
            self._files.create(SegmentHeader(number, record_bytes, slots, generation))
            try:
                self._index.put_segment(SegmentRow(number, record_bytes, slots, generation))
            except BaseException:
                self._files.delete(number)
                raise
        except BaseException:
            self._space.forget_file(record_bytes, slots)
            raise
        segment = Segment(number, record_bytes, slots, self._catalog.ages)
        self._space.add_new(segment, generation)

    def _reclaim(self, record_bytes: int) -> bool:
        """Turn the least valuable segment into a free one; False if there is none to be had."""
        victim = self._choose_victim(record_bytes)
        if victim is None:
            return False
        if not self._space.begin_reclaim(victim):
            return True  # Somebody was faster: another one next time.
        try:
            self._carry_over(victim)
        except BaseException:
            self._space.end_reclaim(victim, is_empty=False)
            raise
        self._empty(victim)
        self._counters.add(reclaimed_segments=1)
        return True

    def _choose_victim(self, record_bytes: int) -> Segment | None:
        catalog = self._catalog
        others = self._space.partly_filled(record_bytes)
        return choose_victim(catalog.board, others, catalog.ages, catalog.clock)

    def _carry_over(self, victim: Segment) -> None:
        """Move pages that deserve it: at half speed while there are enough free segments, the
        faster the fewer there are."""
        room = self._space.room_for_survivors(victim.record_bytes)
        n_moved = 0
        for chunk in self._mover.chunks(victim, choose_survivors(victim, room)):
            if self._is_late():
                break
            started = time.monotonic()
            targets = self._space.take_for_survivors(victim.record_bytes, len(chunk))
            try:
                if targets:
                    n_moved += self._mover.move(victim, chunk[: len(targets)], targets)
            finally:
                self._space.finish_writes(targets)
            if len(targets) < len(chunk):
                break
            took_s = time.monotonic() - started
            leisure = self._space.leisure(victim.record_bytes)
            self._pause(min(leisure * took_s, _LONGEST_PAUSE_S))
        self._counters.add(moved_pages=n_moved)

    def _is_late(self) -> bool:
        since = min((need.since for need in list(self._space.needs.values())), default=None)
        return since is not None and time.monotonic() - since > PATIENCE_S

    def _empty(self, victim: Segment) -> None:
        """Forget the pages of a segment that is being reclaimed, in memory, then in the index."""
        is_empty = False
        try:
            self._counters.add(dropped_pages=self._space.drop_pages(victim))
            self._index.replace_runs(victim.number, [])
            is_empty = True
        finally:
            self._space.end_reclaim(victim, is_empty=is_empty)
