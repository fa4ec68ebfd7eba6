"""Program-level least attained service: PLAS of Agentix (NSDI 2026; arXiv 2502.13965, Autellix).

Whose program was given least comes first, with all that the programs it started were given. As in
the paper, service is put into queues, each twice as long as the one before, with first come first
served within: programs that are close do not take turns.
"""

from __future__ import annotations

import math
from heapq import nsmallest

from tiered_kv.scheduler.plan import AdmissionPlan
from tiered_kv.scheduler.programs import Programs
from tiered_kv.scheduler.request import QueuedRequest
from tiered_kv.scheduler.request_policy import QuietPolicy, SchedulerState

#: Service below this is one queue; ours, the paper leaves it to the operator.
FIRST_QUEUE_S = 1.0


class LeastAttainedProgram(QuietPolicy):
    """Without preemption: who runs goes on."""

    def __init__(self) -> None:
        self.programs = Programs()

    def on_arrival(self, request: QueuedRequest, now_s: float) -> None:
        """A call of a program, known or new."""
        self.programs.arrived(request, now_s)

    def on_admission(self, request: QueuedRequest, now_s: float) -> None:
        """Its program is given something from now on."""
        self.programs.admitted(request, now_s)

    def on_finish(self, request: QueuedRequest, now_s: float) -> None:
        """What it was given counts."""
        self.programs.ended(request, now_s)

    def on_abort(self, request: QueuedRequest, now_s: float) -> None:
        """Likewise."""
        self.programs.ended(request, now_s)

    def plan(self, state: SchedulerState, limit: int) -> AdmissionPlan:
        """See `RequestPolicy.plan`."""
        order = nsmallest(limit, state.candidates(), key=self._key)
        return AdmissionPlan(tuple(request.request_id for request in order))

    def _key(self, request: QueuedRequest) -> tuple[int, float]:
        attained_s = self.attained_s(request)
        queue = 0 if attained_s < FIRST_QUEUE_S else 1 + int(math.log2(attained_s / FIRST_QUEUE_S))
        return queue, request.arrival_s

    def attained_s(self, request: QueuedRequest) -> float:
        """Seconds of service that a call counts with."""
        return self.programs.of(request).root().served_s
