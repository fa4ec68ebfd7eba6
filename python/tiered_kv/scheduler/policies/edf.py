"""Earliest deadline first (Liu and Layland, JACM 1973); the deadline is that of the first token."""

from __future__ import annotations

from heapq import nsmallest

from tiered_kv.memory.read_order import Urgency
from tiered_kv.scheduler.plan import AdmissionPlan
from tiered_kv.scheduler.request import QueuedRequest
from tiered_kv.scheduler.request_policy import QuietPolicy, SchedulerState


class EarliestDeadlineFirst(QuietPolicy):
    """Arrival plus TTFT objective; those without one last; among equals, by arrival."""

    def plan(self, state: SchedulerState, limit: int) -> AdmissionPlan:
        """See `RequestPolicy.plan`."""
        order = nsmallest(limit, state.candidates(), key=_key)
        return AdmissionPlan(tuple(request.request_id for request in order))

    def urgency(self, request: QueuedRequest) -> Urgency:
        """See `RequestPolicy.urgency`."""
        return _key(request)


def _key(request: QueuedRequest) -> tuple[float, float]:
    return request.deadline_s, request.arrival_s
