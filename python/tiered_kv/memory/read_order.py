"""Who is read for next, who gives up its room on the host for that, and how long anybody waits.

Requests whose pages are on disk want three things that are scarce: the link to the disk, room in
the host pool where what was read stays until they run, and time. All go by the policy's order.

- The room is a share of the pool. A page counts once, however many requests hold it. Who finds none
  takes it from those who are less urgent, the least urgent first; what these held is ordinary cache
  from then on. Who finds none even so stays in line, and others that fit may pass; it is not kept
  from running meanwhile.
- Patience runs from the moment the request came, whether or not anything was read for it since.

Names are those of the requests. Nothing is moved here: answers say whom to read for, and who lets
go.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Urgency: TypeAlias = tuple[float, float]
"""Smaller is more urgent."""
LEAST_URGENT: Urgency = (float("inf"), float("inf"))

Pages: TypeAlias = npt.NDArray[np.int64]
"""Ids of host pages."""


class ReadOrder:
    """Requests that wait for their turn to be read for, and those that hold room, by urgency."""

    def __init__(
        self, n_host_pages: int, room_pages: int, urgency_of: Callable[[str], Urgency]
    ) -> None:
        """`room_pages` of the pool may be held. urgency_of: as it is now; asked when it counts."""
        self.room_pages = max(1, room_pages)
        self._urgency_of = urgency_of
        self._n_holders = np.zeros(n_host_pages, dtype=np.int32)
        """Of each page."""
        self._n_held = 0
        self._held: dict[str, Pages] = {}
        self._in_line = _ByUrgency()
        self._holders = _ByUrgency()
        self._until_s: dict[str, float] = {}
        self._ends: list[tuple[float, str]] = []

    @property
    def free_pages(self) -> int:
        """Room that nobody holds."""
        return self.room_pages - self._n_held

    # -- the line -----------------------------------------------------------------------------

    def wait(self, name: str) -> None:
        """`name` wants to be read for."""
        self._in_line.put(name, self._urgency_of(name))

    def is_in_line(self, name: str) -> bool:
        return name in self._in_line

    @property
    def n_in_line(self) -> int:
        return len(self._in_line)

    def first_in_line(self, n: int) -> list[str]:
        """The `n` most urgent of those in line, the most urgent first."""
        return self._in_line.first(n, self._urgency_of)

    def leave_line(self, name: str) -> None:
        """`name` is read for, or needs no reading any more."""
        self._in_line.discard(name)

    def drop(self, name: str) -> None:
        """`name` runs, or is gone. It must hold nothing any more."""
        assert name not in self._held
        self._in_line.discard(name)
        self._until_s.pop(name, None)

    # -- room ---------------------------------------------------------------------------------

    def make_room(self, name: str, pages: Pages, n_new: int) -> list[str] | None:
        """Who must `let_go` so that `name` may hold the host's `pages` and `n_new` more.

        None if there is no room although all who are less urgent did.
        """
        urgency = self._urgency_of(name)
        displaced: list[str] = []
        # Time makes those less urgent who were the most urgent: their latest start passes.
        self._holders.first(1, self._urgency_of)
        # Tried on the counts, and taken back: two may hold the same page.
        for holder_urgency, holder in self._holders.last(self._urgency_of):
            if holder_urgency <= urgency or self._fits(pages, n_new):
                break
            displaced.append(holder)
            self._count(self._held[holder], -1)
        fits = self._fits(pages, n_new)
        for holder in displaced:
            self._count(self._held[holder], 1)
        return displaced if fits else None

    def hold(self, name: str, pages: Pages) -> None:
        """`name` holds the host's `pages`, all different, instead of those it held before."""
        self.let_go(name)
        self._held[name] = pages
        self._count(pages, 1)
        self._holders.put(name, self._urgency_of(name))

    def let_go(self, name: str) -> None:
        """`name` holds nothing any more."""
        pages = self._held.pop(name, None)
        if pages is not None:
            self._count(pages, -1)
            self._holders.discard(name)

    def clear(self) -> None:
        """The pool was emptied."""
        for name in list(self._held):
            self.let_go(name)

    def _fits(self, pages: Pages, n_new: int) -> bool:
        not_held = int(np.count_nonzero(self._n_holders[pages] == 0))
        return not_held + n_new <= self.free_pages

    def _count(self, pages: Pages, step: int) -> None:
        counts = self._n_holders
        if step > 0:
            self._n_held += int(np.count_nonzero(counts[pages] == 0))
        counts[pages] += step
        if step < 0:
            self._n_held -= int(np.count_nonzero(counts[pages] == 0))

    # -- patience -----------------------------------------------------------------------------

    def wait_until(self, name: str, until_s: float) -> None:
        """`name` waits for its pages until then at the latest."""
        self._until_s[name] = until_s
        heapq.heappush(self._ends, (until_s, name))

    @property
    def next_end_s(self) -> float:
        """Nobody's patience is over before that; infinite if nobody waits."""
        return self._ends[0][0] if self._ends else float("inf")

    def out_of_patience(self, now_s: float) -> list[str]:
        """Those whose patience is over by now, each once. O(log n) for each."""
        over: list[str] = []
        while self._ends and self._ends[0][0] < now_s:
            until_s, name = heapq.heappop(self._ends)
            if self._until_s.get(name) == until_s:
                del self._until_s[name]
                over.append(name)
        return over


class _ByUrgency:
    """Names in the order of their urgencies; of equals, who came first."""

    def __init__(self) -> None:
        self._items: list[tuple[Urgency, int, str]] = []
        self._item_of: dict[str, tuple[Urgency, int, str]] = {}
        self._n_put = 0

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, name: str) -> bool:
        return name in self._item_of

    def put(self, name: str, urgency: Urgency) -> None:
        self.discard(name)
        self._n_put += 1
        item = self._item_of[name] = (urgency, self._n_put, name)
        insort(self._items, item)

    def discard(self, name: str) -> None:
        item = self._item_of.pop(name, None)
        if item is not None:
            del self._items[bisect_left(self._items, item)]

    def _is_now(self, item: tuple[Urgency, int, str], urgency: Urgency) -> bool:
        """Whether it has that urgency; if not, it has it from now on, and another place."""
        if item[0] == urgency:
            return True
        self._item_of[item[2]] = moved = (urgency, item[1], item[2])
        del self._items[bisect_left(self._items, item)]
        insort(self._items, moved)
        return False

    def first(self, n: int, urgency_of: Callable[[str], Urgency]) -> list[str]:
        """The first `n`. Who has become less urgent since it was put takes its new place."""
        at = 0
        while at < min(n, len(self._items)):
            item = self._items[at]
            if self._is_now(item, max(item[0], urgency_of(item[2]))):
                at += 1
        return [name for _, _, name in self._items[:n]]

    def last(self, urgency_of: Callable[[str], Urgency]) -> Iterator[tuple[Urgency, str]]:
        """The last first. Who has become more urgent since it was put takes its new place."""
        at = len(self._items) - 1
        while at >= 0:
            item = self._items[at]
            if self._is_now(item, min(item[0], urgency_of(item[2]))):
                yield item[0], item[2]
                at -= 1
