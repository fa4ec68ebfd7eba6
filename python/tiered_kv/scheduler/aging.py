"""Aging: nobody waits for ever, whatever is more urgent or cheaper.

Two means. Where no deadline decides, requests are ordered by arrival plus a multiple of their work
(`aged_key`): a request can be overtaken only by those that arrive within that multiple of the
difference in work. And whoever has waited for `max_wait` is overdue: the overdue are admitted in
the order of arrival, and get at least a fixed share of the work that is admitted as long as there
are any (`Overdue`). docs/scheduler.md says what follows from that.
"""

from __future__ import annotations

from tiered_kv.scheduler.ordered import OrderedIds


def aged_key(arrival_s: float, work_s: float, patience: float) -> float:
    """The order of those without a deadline to meet: smaller first.

    patience: a request waits this many times the work by which it exceeds another.
    """
    return arrival_s + patience * work_s


class Overdue:
    """Waiting requests by the time at which their patience ends, and the share they were given."""

    def __init__(self, share: float) -> None:
        """`share`: of the work admitted while somebody is overdue, in (0, 1]."""
        self._share = share
        self._patient = OrderedIds()
        """By the end of their patience."""
        self._overdue = OrderedIds()
        """By arrival."""
        self._arrivals: dict[int, float] = {}
        self._admitted_s = 0.0
        self._overdue_s = 0.0

    def add(self, request_id: int, arrival_s: float, max_wait_s: float) -> None:
        """It waits, since `arrival_s`."""
        self._arrivals[request_id] = arrival_s
        self._patient.put(request_id, arrival_s + max_wait_s)

    def remove(self, request_id: int) -> None:
        """It was admitted, or is gone."""
        self._patient.discard(request_id)
        self._overdue.discard(request_id)
        self._arrivals.pop(request_id, None)

    def by_arrival(self, now_s: float) -> OrderedIds:
        """Those who are overdue, by arrival. Amortised O(log n) for each that became so."""
        while self._patient.first_key() <= now_s:
            request_id = next(iter(self._patient))
            self._patient.discard(request_id)
            self._overdue.put(request_id, self._arrivals[request_id])
        return self._overdue

    def admitted(self, work_s: float, *, in_turn: bool, now_s: float) -> None:
        """A request was admitted with this much work.

        in_turn: it was the oldest of the overdue that could start, and it was their turn. One that
        came in otherwise, by its deadline say, does not count against the share of older ones.
        """
        if not in_turn and not self.by_arrival(now_s):
            self._admitted_s = self._overdue_s = 0.0
            return
        self._admitted_s += work_s
        if in_turn:
            self._overdue_s += work_s

    def is_their_turn(self) -> bool:
        """Whether the overdue have had no more than their share: then they come first."""
        return self._overdue_s <= self._share * self._admitted_s
