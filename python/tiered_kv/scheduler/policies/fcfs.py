"""First come, first served: upstream's `fcfs` (managers/schedule_policy.py)."""

from __future__ import annotations

from itertools import islice

from tiered_kv.scheduler.plan import AdmissionPlan
from tiered_kv.scheduler.request_policy import QuietPolicy, SchedulerState


class FirstComeFirstServed(QuietPolicy):
    """Queue order; as upstream, a retracted request joins at the end again."""

    def plan(self, state: SchedulerState, limit: int) -> AdmissionPlan:
        """See `RequestPolicy.plan`."""
        waiting, held = state.waiting.requests, state.held
        ready = (rid for rid in waiting if rid not in held) if held else iter(waiting)
        return AdmissionPlan(tuple(islice(ready, limit)))
