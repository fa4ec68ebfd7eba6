"""Orders of SGLang 0.5.23 as baselines, decision for decision (managers/schedule_policy.py).

A server of such a release has them by its own `--schedule-policy`; here is what they would do.
`scheduler/policies/hrrn.py` is the idea of the first without its habits: it sorts any queue.
"""

from __future__ import annotations

import math

from tiered_kv.scheduler.plan import AdmissionPlan
from tiered_kv.scheduler.policies.lpm import LongestPrefixMatch, Place
from tiered_kv.scheduler.request import QueuedRequest
from tiered_kv.scheduler.request_policy import SchedulerState


class HighestResponseRatio(LongestPrefixMatch):
    """Its `hrrn`: not sorted above 128 waiting, and those that begin like another one go last."""

    def place(self, request: QueuedRequest, state: SchedulerState, *, is_late: bool) -> Place:
        """See `LongestPrefixMatch.place`."""
        if is_late:
            return math.inf, request.request_id
        uncached = request.prompt_tokens - request.cached_tokens
        if uncached <= 0:
            return -math.inf, request.request_id
        waited = max(0, state.processed_prefill_tokens - request.processed_at_arrival)
        return -waited / uncached, request.request_id


class ShortestPrefillFirst(LongestPrefixMatch):
    """Its `shortest-prefill-first`, which sorts any queue.

    A prompt that was begun leaves room in the pass for those who wait and have less to compute.
    """

    max_sorted = math.inf

    def place(self, request: QueuedRequest, state: SchedulerState, *, is_late: bool) -> Place:  # noqa: ARG002
        """See `LongestPrefixMatch.place`."""
        return is_late, request.uncached_tokens, request.queued_s

    def plan(self, state: SchedulerState, limit: int) -> AdmissionPlan:
        """See `RequestPolicy.plan`."""
        order = super().plan(state, limit).order
        at_most = None if state.unfinished is None else self._chunk(state, state.unfinished)
        return AdmissionPlan(order, unfinished_at_most=at_most)

    def _chunk(self, state: SchedulerState, begun: QueuedRequest) -> int | None:
        """Most tokens of the prompt that was begun, whole pages; None: all that fit the pass."""
        page, budget = state.page_tokens, state.chunk_tokens
        if budget < 2 * page:
            return None
        reserved = 0
        for request in self.queued(state):
            work = request.uncached_tokens
            charge = -(-work // page) * page
            if work >= begun.unprefilled_tokens or reserved + charge > budget - page:
                break
            reserved += charge
        return (budget - reserved) // page * page if reserved else None
