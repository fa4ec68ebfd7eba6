"""Turns by age, as a baseline: who got a token the longest ago goes first, whatever was promised.

The iteration is filled until it would take longer than the tightest objective among all. It knows
neither slack, nor whether taking turns pays.
"""

from __future__ import annotations

import math

from tiered_kv.scheduler.cost_model import CostModel
from tiered_kv.scheduler.iteration_batch import Packing, with_gangs
from tiered_kv.scheduler.iteration_policy import (
    EVERYONE,
    IterationPlan,
    IterationState,
    RunningTotals,
)
from tiered_kv.scheduler.prefill_room import CAUTION


class RoundRobin:
    """Stateless."""

    def fits(self, totals: RunningTotals, costs: CostModel, now_s: float) -> bool:  # noqa: ARG002
        """Whether an iteration of all is no longer than the tightest objective."""
        seconds = costs.iteration_s((), totals.context_tokens, totals.n, totals.shared_tokens_saved)
        return seconds <= CAUTION * totals.tightest_tbt_s

    def plan(self, state: IterationState) -> IterationPlan:
        """See `IterationPolicy.plan`. Chunks are as configured, and nobody is swapped out."""
        running = state.running
        objectives = [r.tbt_s for r in running if r.tbt_s is not None]
        limit_s = CAUTION * min(objectives, default=math.inf)
        batch = Packing(state.costs, is_cascade=state.is_cascade)
        batch.add(r for r in running if not r.can_park)
        order = sorted(
            (r for r in running if r.can_park), key=lambda r: (r.last_token_s, r.request_id)
        )
        if state.is_cascade:
            order = with_gangs(order)
        if order:
            # The first has its turn even if it does not fit: else it never would.
            batch.add(order[:1])
        parked = batch.fill(order[1:], limit_s)
        return IterationPlan(tuple(r.request_id for r in batch.chosen)) if parked else EVERYONE
