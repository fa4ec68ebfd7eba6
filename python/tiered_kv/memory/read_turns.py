"""Whose pages are read next from one store: the most urgent's, a stretch at a time.

No long read holds up a short one. Nothing is read here; whoever reads asks for the next stretch and
says what arrived.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

from tiered_kv.memory.probes import PROBE_PAGES
from tiered_kv.memory.read_order import LEAST_URGENT, Urgency

#: After this many pages of a read, it is seen who is the most urgent now.
READ_STRETCH_PAGES = 64

AT_ONCE: Urgency = (float("-inf"), 0.0)


@dataclass(frozen=True, slots=True)
class Stretch:
    """Pages of a read, the next in its order; none if nobody wants the rest: then it is over."""

    op: int
    start: int
    stop: int
    is_last: bool
    """Whether the read is over after these, whatever there is to read."""


@dataclass(slots=True, eq=False)
class _Turn:
    n_pages: int
    urgency: Urgency
    n_done: int = 0
    is_as_asked: bool = True
    is_wanted: bool = True
    is_probe: bool = False
    is_over: bool = False


class ReadTurns:
    """Reads by op, from `add` to `drop`.

    pages_per_unit: of the server's, in what is counted here as one page.
    """

    def __init__(self, pages_per_unit: float = 1.0) -> None:
        self._pages_per_unit = pages_per_unit
        self._turns: dict[int, _Turn] = {}
        # Of those that are not over, by urgency, then in the order in which they came; one whose
        # urgency changed is in there more than once.
        self._order: list[tuple[Urgency, int, int]] = []
        self._n_pushed = 0

    def __iter__(self) -> Iterator[int]:
        """All that were not dropped, in the order in which they came."""
        return iter(self._turns)

    def __bool__(self) -> bool:
        """Whether `next` may have something to do."""
        return bool(self._order)

    def add(self, op: int, n_pages: int, urgency: Urgency = AT_ONCE) -> None:
        turn = self._turns[op] = _Turn(n_pages, urgency)
        self._push(op, turn)

    def hurry(self, op: int, urgency: Urgency) -> None:
        """Somebody waits for this read who is as urgent as that."""
        turn = self._turns[op]
        if urgency < turn.urgency or not turn.is_wanted:
            turn.is_wanted, turn.is_probe = True, False
            turn.urgency = urgency
            self._push(op, turn)

    def forget(self, op: int, *, is_probe: bool = False) -> None:
        """Nobody waits for this read any more: it ends after the stretch under way.

        is_probe: its first pages are read all the same, after all others, to see how long it takes.
        """
        turn = self._turns[op]
        turn.is_wanted, turn.is_probe = False, is_probe
        turn.urgency = LEAST_URGENT if is_probe else AT_ONCE
        self._push(op, turn)

    def pages_before(self, urgency: Urgency) -> int:
        """Pages of the reads that come before one of that urgency, of those not dropped."""
        return sum(turn.n_pages for turn in self._turns.values() if turn.urgency <= urgency)

    def next(self) -> Stretch | None:
        """What to read now; None: nothing."""
        while self._order:
            urgency, _, op = self._order[0]
            turn = self._turns.get(op)
            if turn is None or turn.is_over or turn.urgency != urgency:
                heapq.heappop(self._order)
                continue
            is_probing = turn.is_probe and not turn.n_done
            if not turn.is_wanted and not is_probing:
                return Stretch(op, turn.n_done, turn.n_done, is_last=True)
            n_pages = self._scaled(PROBE_PAGES if is_probing else READ_STRETCH_PAGES)
            stop = min(turn.n_done + n_pages, turn.n_pages)
            return Stretch(op, turn.n_done, stop, is_last=is_probing or stop == turn.n_pages)
        return None

    def arrived(self, stretch: Stretch, n_pages: int) -> bool:
        """The leading `n_pages` of a stretch are there; returns whether the read is over."""
        turn = self._turns[stretch.op]
        turn.n_done += n_pages
        turn.is_as_asked = turn.n_done == stretch.stop
        return stretch.is_last or not turn.is_as_asked

    def end(self, op: int) -> tuple[int, bool]:
        """The read is over; returns how many pages came, and whether all that were asked for."""
        turn = self._turns[op]
        turn.is_over = True
        return turn.n_done, turn.is_as_asked

    def drop(self, op: int) -> None:
        """The end of the read has been acknowledged."""
        del self._turns[op]

    def _push(self, op: int, turn: _Turn) -> None:
        self._n_pushed += 1
        heapq.heappush(self._order, (turn.urgency, self._n_pushed, op))

    def _scaled(self, n_pages: int) -> int:
        return max(1, int(n_pages / self._pages_per_unit))
