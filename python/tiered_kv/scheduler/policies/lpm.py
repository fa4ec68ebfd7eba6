"""Longest prefix match first: upstream's `lpm` (managers/schedule_policy.py), its default.

Three of its habits are kept because they shape its latencies. Above 128 waiting requests it does
not sort. It sorts the queue in place, so what it leaves unsorted keeps the last order. And of
several requests with the same uncached beginning only the first competes; the others, which would
compute the same beside it, go to the end.
"""

from __future__ import annotations

from itertools import islice
from typing import ClassVar, TypeAlias

from tiered_kv.scheduler.plan import AdmissionPlan
from tiered_kv.scheduler.request import QueuedRequest
from tiered_kv.scheduler.request_policy import QuietPolicy, SchedulerState

MAX_SORTED = 128
Place: TypeAlias = tuple[float, ...]
"""Where a request goes in the queue: lesser ones first, equal ones stay as they were."""
IN_BATCH_TOKENS = 32
"""Upstream's two in-batch thresholds: looked for below this hit, counted from this match on."""


class LongestPrefixMatch(QuietPolicy):
    """Longest cached prefix (device and host) first; ties keep their order."""

    max_sorted: ClassVar[float] = MAX_SORTED
    """Of more who wait than this nobody is moved."""

    def __init__(self) -> None:
        self._queue: dict[int, None] = {}

    def on_arrival(self, request: QueuedRequest, now_s: float) -> None:  # noqa: ARG002
        """It joins at the end."""
        self._queue[request.request_id] = None

    def on_admission(self, request: QueuedRequest, now_s: float) -> None:  # noqa: ARG002
        """It left."""
        self._queue.pop(request.request_id, None)

    def on_abort(self, request: QueuedRequest, now_s: float) -> None:  # noqa: ARG002
        """It left."""
        self._queue.pop(request.request_id, None)

    def plan(self, state: SchedulerState, limit: int) -> AdmissionPlan:
        """See `RequestPolicy.plan`."""
        if len(self._queue) <= self.max_sorted:
            self._sort(state)
        held = state.held
        ready = (rid for rid in self._queue if rid not in held)
        return AdmissionPlan(tuple(islice(ready, limit)))

    def place(self, request: QueuedRequest, state: SchedulerState, *, is_late: bool) -> Place:  # noqa: ARG002
        """What the queue is sorted by; is_late: it begins like one before it (`deprioritized`)."""
        return is_late, -request.cached_tokens

    def queued(self, state: SchedulerState) -> list[QueuedRequest]:
        """All who wait, as they were sorted last."""
        waiting = state.waiting.requests
        return [waiting[rid] for rid in self._queue if rid in waiting]

    def _sort(self, state: SchedulerState) -> None:
        queue = self.queued(state)
        late = deprioritized(queue, state.waiting.tokens_per_unit)
        queue.sort(key=lambda r: self.place(r, state, is_late=r.request_id in late))
        self._queue = {request.request_id: None for request in queue}


def deprioritized(queue: list[QueuedRequest], tokens_per_unit: int) -> set[int]:
    """Ids of requests with no cached prefix to speak of that begin like one before them."""
    n_units = -(-IN_BATCH_TOKENS // tokens_per_unit)
    seen: set[tuple[int, bytes]] = set()
    late: set[int] = set()
    for request in queue:
        if request.device_tokens > IN_BATCH_TOKENS or len(request.tokens) < n_units:
            continue
        beginning = request.root.node_id, request.tokens[:n_units].tobytes()
        if beginning in seen:
            late.add(request.request_id)
        seen.add(beginning)
    return late
