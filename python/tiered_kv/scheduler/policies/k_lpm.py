"""k-LPM (arXiv 2502.04677): the oldest request, then k - 1 with the longest cached prefix, again.

Plain longest-prefix-match starves requests that share nothing; the oldest request's turn in every
k bounds their wait.
"""

from __future__ import annotations

import heapq

from tiered_kv.scheduler.plan import AdmissionPlan
from tiered_kv.scheduler.request import QueuedRequest
from tiered_kv.scheduler.request_policy import QuietPolicy, SchedulerState


class OldestThenLongestPrefix(QuietPolicy):
    """The cycle goes on across iterations: it counts admissions."""

    def __init__(self, k: int = 4) -> None:
        self._k = k
        self._turn = 0

    def on_admission(self, request: QueuedRequest, now_s: float) -> None:  # noqa: ARG002
        """One turn of the cycle was used."""
        self._turn = (self._turn + 1) % self._k

    def plan(self, state: SchedulerState, limit: int) -> AdmissionPlan:
        """See `RequestPolicy.plan`."""
        candidates = state.candidates()
        # Nobody can be picked later than as the `limit`-th of either order.
        oldest = heapq.nsmallest(limit, candidates, key=_by_arrival)
        longest = heapq.nsmallest(limit, candidates, key=_by_prefix)
        order: dict[int, None] = {}
        turn = self._turn
        while len(order) < min(limit, len(candidates)):
            source = oldest if turn == 0 else longest
            pick = next(r.request_id for r in source if r.request_id not in order)
            order[pick] = None
            turn = (turn + 1) % self._k
        return AdmissionPlan(tuple(order))


def _by_arrival(request: QueuedRequest) -> float:
    return request.arrival_s


def _by_prefix(request: QueuedRequest) -> int:
    return -request.cached_tokens
