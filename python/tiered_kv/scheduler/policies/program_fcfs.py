"""Programs first come, first served: the order of Continuum (arXiv 2511.02230).

The calls of the program that began first come first, so that the contexts in use at a time are few.
Its times to live across tool calls are the cache's business (`next_calls.py`).
"""

from __future__ import annotations

from heapq import nsmallest

from tiered_kv.memory.read_order import Urgency
from tiered_kv.scheduler.plan import AdmissionPlan
from tiered_kv.scheduler.policies.plas import LeastAttainedProgram
from tiered_kv.scheduler.request import QueuedRequest
from tiered_kv.scheduler.request_policy import SchedulerState


class FirstProgramFirst(LeastAttainedProgram):
    """Among the calls of one program, the one that came first."""

    def plan(self, state: SchedulerState, limit: int) -> AdmissionPlan:
        """See `RequestPolicy.plan`."""
        order = nsmallest(limit, state.candidates(), key=self.urgency)
        return AdmissionPlan(tuple(request.request_id for request in order))

    def urgency(self, request: QueuedRequest) -> Urgency:
        """By when its program began."""
        return self.programs.of(request).started_s, request.arrival_s
