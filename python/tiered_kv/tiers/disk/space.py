"""Which slots new pages get, and what the files there are cost. No I/O is done here.

Slots come from segments that are being filled, and those from free ones. Making and reclaiming
those is the keeper's, ahead of need: a writer that finds none waits. The catalog's lock guards all.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

from tiered_kv.tiers.disk.ages import EPOCHS
from tiered_kv.tiers.disk.budget import Budget
from tiered_kv.tiers.disk.catalog import Catalog, Cleared
from tiered_kv.tiers.disk.ledger import Condemned, FileLedger
from tiered_kv.tiers.disk.segment import Segment, SegmentState

BATCH_BYTES = 128 << 20
"""Bytes written between two acknowledgements of one large batch."""

_ASK_AGAIN_S = 0.25
_DROPS_PER_LOCK = 1_000
_PIECES_PER_STEP = 64  # All at once would hold every thread up.

Slots = list[tuple[Segment, int]]


class Need:
    """Writers wait for a segment with free slots."""

    def __init__(self) -> None:
        self.since = time.monotonic()
        self._is_over = threading.Event()
        self._has_room = False
        self._error: Exception | None = None

    def end(self, *, has_room: bool, error: Exception | None = None) -> None:
        self._has_room, self._error = has_room, error
        self._is_over.set()

    def wait(self, is_stalled: Callable[[], bool]) -> bool:
        """False if there is no room, or the disk hangs. Raises what the keeper ran into."""
        while not self._is_over.wait(_ASK_AGAIN_S):
            if is_stalled():
                return False
        if self._error is not None:
            raise self._error
        return self._has_room


class SpaceManager:
    """Hands out slots, knows which segments are free, and counts what all files cost."""

    def __init__(
        self,
        catalog: Catalog,
        budget: Budget,
        *,
        wake_keeper: Callable[[], None],
        is_stalled: Callable[[], bool],
        other_bytes: int = 0,
    ) -> None:
        self.ledger = FileLedger(budget, other_bytes)
        self.needs: dict[int, Need] = {}
        """By record size."""
        self.to_pack: deque[Segment] = deque()
        """Full segments whose rows in the index may be many."""
        self._catalog = catalog
        self._budget = budget
        self._wake_keeper = wake_keeper
        self._is_stalled = is_stalled
        self._allocated_bytes = 0
        self._next_epoch_at = budget.segment_space // EPOCHS
        self._filling: dict[int, Segment] = {}
        self._partial: dict[int, list[Segment]] = {}
        self._disposing: Cleared | None = None

    # -- slots for new pages

    def pages_per_batch(self, record_bytes: int) -> int:
        """Pages to allocate at a time: slots that wait for their data cannot be reclaimed, so one
        large batch must not claim the whole budget at once."""
        return max(min(BATCH_BYTES // record_bytes, self.ledger.geometry(record_bytes).slots), 1)

    def allocate(self, record_bytes: int, count: int) -> Slots:
        """Up to `count` slots, fewer if there is no room even after reclaiming.

        Every segment returned counts the slots as `writers` until `finish_writes`. Raises OSError
        or sqlite3.Error if a segment cannot be made or reclaimed.
        """
        slots: Slots = []
        try:
            while len(slots) < count:
                with self._catalog.lock:
                    taken = self._take(record_bytes, count - len(slots))
                    need = None if taken else self.needs.setdefault(record_bytes, Need())
                    is_short = need is not None or self._is_short(record_bytes)
                slots += taken
                if is_short:
                    self._wake_keeper()
                if need is not None and not need.wait(self._is_stalled):
                    break
        except BaseException:
            self.finish_writes(slots)
            raise
        return slots

    def finish_writes(self, slots: Iterable[tuple[Segment, int]]) -> None:
        with self._catalog.lock:
            for segment, _ in slots:
                segment.writers -= 1
                if not segment.writers and segment.state is SegmentState.SEALED:
                    self._offer(segment)

    def _take(self, record_bytes: int, count: int) -> Slots:
        """Slots for new pages; what is reserved for survivors is left alone while it is needed."""
        while True:
            segment = self._filling.get(record_bytes) or self._next_to_fill(record_bytes)
            if segment is None:
                return []
            room = segment.free_slots - segment.reserved
            if room > 0:
                return self._take_slots(segment, min(count, room))
            if not segment.free_slots:
                self._seal(segment)
            elif self._has_another(record_bytes):
                segment.reserved = 0
            else:
                return []  # Now is the time to reclaim, while there is room for the survivors.

    def take_for_survivors(self, record_bytes: int, count: int) -> Slots:
        """Slots for pages of a segment that is being reclaimed, maybe fewer than `count`."""
        with self._catalog.lock:
            segment = self._filling.get(record_bytes)
            if segment is not None and not segment.free_slots:
                self._seal(segment)
                segment = None
            # A reclaim shall not use up more than it brings.
            if segment is None and len(self.ledger.free(record_bytes)) > 1:
                segment = self._next_to_fill(record_bytes)
            if segment is None:
                return []
            segment.reserved = max(segment.reserved - count, 0)
            return self._take_slots(segment, min(count, segment.free_slots))

    def room_for_survivors(self, record_bytes: int) -> int:
        with self._catalog.lock:
            segment = self._filling.get(record_bytes)
            room = 0 if segment is None else segment.free_slots
            spare = self.ledger.free(record_bytes)
            return room + (spare[-1].slots if len(spare) > 1 else 0)

    def _take_slots(self, segment: Segment, count: int) -> Slots:
        first = segment.next_slot
        segment.next_slot += count
        segment.writers += count
        self._allocated_bytes += count * segment.record_bytes
        segment.filled_at = self._allocated_bytes
        if self._allocated_bytes >= self._next_epoch_at:
            self._next_epoch_at = self._allocated_bytes + self._budget.segment_space // EPOCHS
            self._catalog.begin_epoch()
        return [(segment, slot) for slot in range(first, first + count)]

    def _next_to_fill(self, record_bytes: int) -> Segment | None:
        """A segment left partly filled by an earlier run, or a free one."""
        partial, free = self._partial.get(record_bytes), self.ledger.free(record_bytes)
        if partial:
            segment = partial.pop()
        elif free:
            segment = free.pop()
            segment.reset()
        else:
            return None
        segment.filled_at = self._allocated_bytes
        self._filling[record_bytes] = segment
        return segment

    def _seal(self, segment: Segment) -> None:
        segment.state = SegmentState.SEALED
        del self._filling[segment.record_bytes]
        if not segment.writers:
            self._offer(segment)

    def _offer(self, segment: Segment) -> None:
        """The segment is full, and nobody writes to it any more."""
        if self._catalog.is_current(segment):
            self._catalog.offer(segment)
            self.to_pack.append(segment)
            self._wake_keeper()

    def _has_another(self, record_bytes: int) -> bool:
        """Can a segment be had without reclaiming one?"""
        return bool(self.ledger.free(record_bytes)) or self.ledger.fits_new(record_bytes)

    # -- what the keeper should do

    def sizes_short_of_spares(self) -> list[int]:
        """Record sizes that are being written and have fewer free segments than they should."""
        with self._catalog.lock:
            return [size for size in self._filling if self._is_short(size)]

    def _is_short(self, record_bytes: int) -> bool:
        segment = self._filling.get(record_bytes)
        if segment is None or self._is_idle(segment):
            return False
        wanted = self.ledger.geometry(record_bytes).n_spare
        if wanted and self.ledger.fits_new(record_bytes):
            # As long as the budget isn't used up a new file is made in time, and no sooner.
            wanted = 1 if segment.next_slot >= 0.75 * segment.slots else 0
        # Of all sizes together: two that take turns must not take each other's away.
        return sum(len(self.ledger.free(size)) for size in self._sizes_in_use()) < wanted

    def _sizes_in_use(self) -> list[int]:
        return [size for size, segment in self._filling.items() if not self._is_idle(segment)]

    def _is_idle(self, segment: Segment) -> bool:
        """Has a segment's worth been written elsewhere since a page was written here?"""
        return self._allocated_bytes - segment.filled_at >= segment.file_bytes

    def leisure(self, record_bytes: int) -> float:
        """1 while there are as many free segments as there should be, 0 when there are none."""
        with self._catalog.lock:
            n_free = len(self.ledger.free(record_bytes))
            return min(n_free / max(self.ledger.geometry(record_bytes).n_spare, 1), 1.0)

    def has_free(self, record_bytes: int) -> bool:
        with self._catalog.lock:
            return bool(self.ledger.free(record_bytes))

    def end_need(
        self, record_bytes: int, *, has_room: bool, error: Exception | None = None
    ) -> None:
        """Tell the writers; what was made for them is nobody else's from now on."""
        with self._catalog.lock:
            need = self.needs.pop(record_bytes, None)
            segment = self._filling.get(record_bytes)
            if segment is not None and not segment.free_slots:
                self._seal(segment)
                segment = None
            if segment is not None and error is None and segment.reserved:
                # Without room the reserve is better than not to write at all.
                segment.reserved, has_room = 0, True
            elif segment is None and has_room:
                self._next_to_fill(record_bytes)
        if need is not None:
            need.end(has_room=has_room, error=error)

    # -- reclaim

    def partly_filled(self, record_bytes: int) -> list[Segment]:
        """Segments that may be reclaimed for this record size although they aren't full: nobody has
        filled them for a while or, if there are no others at all, not with this record size."""
        with self._catalog.lock:
            partial = [segment for some in self._partial.values() for segment in some]
            still = [s for s in (*self._filling.values(), *partial) if not s.writers]
            if self._catalog.board.is_empty and not any(map(self._is_idle, still)):
                return [segment for segment in still if segment.record_bytes != record_bytes]
            return [segment for segment in still if self._is_idle(segment)]

    def begin_reclaim(self, victim: Segment) -> bool:
        """False if it is not to be had any more."""
        with self._catalog.lock:
            is_there = self._catalog.is_current(victim) and not victim.writers
            if not is_there or victim.state not in (SegmentState.SEALED, SegmentState.FILLING):
                return False
            self._set_aside(victim)
            return True

    def end_reclaim(self, victim: Segment, *, is_empty: bool) -> None:
        with self._catalog.lock:
            if not self._catalog.is_current(victim):
                return
            if is_empty:
                victim.state = SegmentState.FREE
                self.ledger.add_free(victim)
            else:
                victim.state = SegmentState.SEALED
                self._catalog.offer(victim)

    def forget_lost(self, segment: Segment) -> int | None:
        """Give up a segment whose file is not whole; returns its pages, None if it is not there any
        more, or is about to be deleted."""
        with self._catalog.lock:
            if not self._catalog.is_current(segment) or segment.state is SegmentState.RECLAIMING:
                return None
            self._set_aside(segment)
        n_pages = self.drop_pages(segment)
        with self._catalog.lock:
            if self._catalog.is_current(segment):
                self._catalog.remove_segment(segment)
                self.ledger.condemn(segment)
        self._wake_keeper()
        return n_pages

    def drop_pages(self, segment: Segment) -> int:
        """Forget all pages of a segment that is set aside; returns how many there were."""
        n_dropped = 0
        slots = iter(segment.live_slots())
        while some := list(itertools.islice(slots, _DROPS_PER_LOCK)):
            with self._catalog.lock:
                n_dropped += self._catalog.drop_pages(segment, some)
        return n_dropped

    def _set_aside(self, segment: Segment) -> None:
        """Nobody fills or reclaims the segment from now on."""
        segment.state = SegmentState.RECLAIMING
        self._catalog.withdraw(segment)
        if self._filling.get(segment.record_bytes) is segment:
            del self._filling[segment.record_bytes]
        partial = self._partial.get(segment.record_bytes, [])
        if segment in partial:
            partial.remove(segment)
        self.ledger.remove_free(segment)

    # -- files

    def is_over_budget(self) -> bool:
        with self._catalog.lock:
            return not self.ledger.fits(0)

    def charge_new(self, record_bytes: int) -> int:
        """Take a new file from the budget; returns its slots, 0 if there is no room for one."""
        with self._catalog.lock:
            if not self.ledger.fits_new(record_bytes):
                return 0
            slots = self.ledger.geometry(record_bytes).slots
            self.ledger.charge(record_bytes, slots)
            return slots

    def forget_file(self, record_bytes: int, slots: int) -> None:
        """A file is not there any more, or never was."""
        with self._catalog.lock:
            self.ledger.charge(record_bytes, slots, times=-1)

    def add_new(self, segment: Segment, generation: int) -> None:
        """A new file is there, made in this generation."""
        with self._catalog.lock:
            if generation != self._catalog.generation:
                self.ledger.condemn(segment)
                return
            self._catalog.add_segment(segment)
            segment.state = SegmentState.FREE
            self.ledger.add_free(segment)

    def add_loaded(self, segment: Segment) -> None:
        """A file of an earlier run, in the state that it is in. The caller holds the lock."""
        self._catalog.add_segment(segment)
        self.ledger.charge(segment.record_bytes, segment.slots)
        if segment.state is SegmentState.SEALED:
            self._catalog.offer(segment)
        if segment.state is SegmentState.FREE:
            self.ledger.add_free(segment)
        elif segment.state is SegmentState.FILLING:
            self._partial.setdefault(segment.record_bytes, []).append(segment)

    def add_condemned(self, file: Condemned) -> None:
        """A file of an earlier run that is of no use. The caller holds the lock."""
        self.ledger.charge(file.record_bytes, file.slots)
        self.ledger.add_condemned(file)

    def condemn_free(self, *, even_spares: bool) -> bool:
        """Choose a free segment to delete; False if there is none. `even_spares`: one, too, that
        another record size in use would fill next."""
        with self._catalog.lock:
            segment = self.ledger.take_useless(() if even_spares else self._sizes_in_use())
            if segment is not None:
                self._catalog.remove_segment(segment)
                self.ledger.condemn(segment)
            return segment is not None

    def next_condemned(self) -> Condemned | None:
        """A file to delete; `forget_file` when that is done, or `condemn_again`."""
        with self._catalog.lock:
            return self.ledger.next_condemned()

    def condemn_again(self, file: Condemned) -> None:
        """It could not be deleted now."""
        with self._catalog.lock:
            self.ledger.add_condemned(file)

    def dispose(self) -> bool:
        """Give some memory of a cleared store back; False if there is none. The keeper's."""
        with self._catalog.lock:
            cleared = self._disposing = self._disposing or self.ledger.take_disposed()
        if cleared is None:
            return False
        if not all(cleared.dispose() for _ in range(_PIECES_PER_STEP)):
            self._disposing = None
        return True

    def clear(self) -> None:
        """Forget every page and segment at once; the files are condemned."""
        with self._catalog.lock:
            self.ledger.clear(self._catalog.clear())
            self._filling.clear()
            self._partial.clear()
            self.to_pack.clear()
