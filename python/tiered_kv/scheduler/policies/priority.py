"""Priority, then age: upstream's `--enable-priority-scheduling` with fcfs, without preemption."""

from __future__ import annotations

from heapq import nsmallest

from tiered_kv.memory.read_order import Urgency
from tiered_kv.scheduler.plan import AdmissionPlan
from tiered_kv.scheduler.request import QueuedRequest
from tiered_kv.scheduler.request_policy import QuietPolicy, SchedulerState


class PriorityFirst(QuietPolicy):
    """Larger priority values first; among equals, who joined the queue first."""

    def plan(self, state: SchedulerState, limit: int) -> AdmissionPlan:
        """See `RequestPolicy.plan`."""
        order = nsmallest(limit, state.candidates(), key=_key)
        return AdmissionPlan(tuple(request.request_id for request in order))

    def urgency(self, request: QueuedRequest) -> Urgency:
        """See `RequestPolicy.urgency`."""
        return _key(request)


def _key(request: QueuedRequest) -> tuple[int, float]:
    return -request.priority, request.queued_s
