"""Highest response ratio next, with work instead of time: newer upstream's `hrrn` (sglang#32911).

The pinned release lacks it. A request's ratio is (prefill tokens that the server computed since the
request arrived) / (its own uncached tokens): waiting counts in work done for others.
"""

from __future__ import annotations

from heapq import nsmallest

from tiered_kv.scheduler.plan import AdmissionPlan
from tiered_kv.scheduler.request import QueuedRequest
from tiered_kv.scheduler.request_policy import QuietPolicy, SchedulerState


class HighestResponseRatio(QuietPolicy):
    """Who has nothing to compute comes first; among equal ratios, who joined the queue first."""

    def plan(self, state: SchedulerState, limit: int) -> AdmissionPlan:
        """See `RequestPolicy.plan`."""
        processed = state.processed_prefill_tokens

        def key(request: QueuedRequest) -> tuple[bool, float]:
            uncached = request.prompt_tokens + request.output_tokens - request.cached_tokens
            # The last token is computed in any case, so one uncached token means all is cached.
            if uncached <= 1:
                return False, 0.0
            return True, -(processed - request.processed_at_arrival) / uncached

        order = nsmallest(limit, state.candidates(), key=key)
        return AdmissionPlan(tuple(request.request_id for request in order))
