"""Asks the iteration-level policy who decodes, and carries it out on the simulated batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tiered_kv.forest.node import Tokens
from tiered_kv.scheduler.cost_model import CostModel
from tiered_kv.scheduler.iteration_policy import (
    IterationPlan,
    IterationPolicy,
    IterationState,
    RunningRequest,
    RunningTotals,
    iteration_policies,
)
from tiered_kv.scheduler.iteration_slack import SlackIterations
from tiered_kv.scheduler.iteration_swap import SWAPS_MAX
from tiered_kv.scheduler.prefill_turns import PrefillTurns
from tiered_kv.scheduler.prompts_ahead import PromptsAhead
from tiered_kv.scheduler.request_policy import SchedulerState
from tiered_kv.simulation.decode_batch import DecodeBatch
from tiered_kv.simulation.live import LiveRequest
from tiered_kv.simulation.settings import InstanceSettings

#: The iteration policy that leaves everything as it is.
ALL_DECODE = "all"
#: Where all decode although not everyone is in time, the policy is asked again after so many.
PASSES_PER_PLAN = 4


@dataclass(slots=True)
class _Gang:
    """Running requests whose prompts begin with the same block."""

    tokens: Tokens
    shared_blocks: int
    n: int = 0


class DecodeSelection:
    """Between one instance's batch and its policy."""

    def __init__(
        self,
        settings: InstanceSettings,
        batch: DecodeBatch,
        costs: CostModel,
        block_tokens: int,
        turns: PrefillTurns,
    ) -> None:
        """`turns`: the instance's. Raises ConfigError for an unknown policy."""
        make = iteration_policies.get(settings.iteration_policy)
        self.policy: IterationPolicy = (
            SlackIterations(settings.iteration) if make is SlackIterations else make()
        )
        self.can_swap = settings.swap
        self._settings = settings
        self._batch = batch
        self._costs = costs
        self._block_tokens = block_tokens
        self._known: dict[int, RunningRequest] = {}
        self._gangs: dict[int, _Gang] = {}
        self._turns = turns

    # -- what happens -------------------------------------------------------------------------

    def joined(self, live: LiveRequest) -> None:
        """A request joined the batch."""
        queued = live.queued
        gang = None
        if len(queued.tokens):
            gang = queued.tokens[0]
            self._add_to_gang(gang, queued.tokens)
        self._known[queued.request_id] = RunningRequest(
            queued.request_id,
            queued.prefilled_tokens,
            live.last_token_s,
            queued.slo.tbt_s,
            gang=gang,
            can_swap=live.n_made_way < SWAPS_MAX,
        )

    def left(self, live: LiveRequest) -> None:
        """A request left the batch."""
        gang_id = self._known.pop(live.queued.request_id).gang
        if gang_id is not None:
            gang = self._gangs[gang_id]
            gang.n -= 1
            if not gang.n:
                del self._gangs[gang_id]

    # -- plans --------------------------------------------------------------------------------

    def plan(
        self,
        now_s: float,
        prefill: SchedulerState | None = None,
        ahead: PromptsAhead | None = None,
        *,
        is_mixed: bool = False,
    ) -> IterationPlan:
        """For the next iteration. `prefill`: what the order of the queue is asked with. `ahead`:
        see `IterationState.ahead`.
        """
        if prefill is not None:
            self._turns.wants_prefill()
        state = self._state(now_s)
        state.prefill, state.ahead, state.is_mixed = prefill, ahead, is_mixed
        state.prefill_load = self._turns.load(is_mixed=is_mixed)
        plan = self.policy.plan(state)
        if prefill is not None:
            self._turns.planned(is_hurried=plan.is_hurried)
        return plan

    def choose(self, now_s: float) -> int:
        """Park and unpark for a pass without prefill; in how many to choose again. 0: any number.

        Until then no pass is longer than the tightest objective, or nothing can be done about it.
        """
        if self.policy.fits(self._totals(now_s), self._costs, now_s):
            self._turns.decided()
            self._batch.choose(None)
            return 0
        plan = self.plan(now_s)
        self._turns.decided()
        self._batch.choose(plan.decode)
        return 1 if plan.decode is not None else PASSES_PER_PLAN

    def passes_that_fit(self, n_passes: int) -> int:
        """How many in a row of all requests, up to `n_passes`, would each be in time."""
        totals, n = self._totals(0.0), self._batch.n_decoding
        # Each starts when the one before it ends.
        totals.decoded_s = 0.0
        low, high = 1, n_passes
        start_tokens = totals.context_tokens
        while low < high:
            middle = (low + high + 1) // 2
            totals.context_tokens = start_tokens + (middle - 1) * n
            if self.policy.fits(totals, self._costs, 0.0):
                low = middle
            else:
                high = middle - 1
        return low

    def swap_out(self, now_s: float, short_tokens: int, for_tbt_s: float | None) -> tuple[int, ...]:
        """Who makes room; see `IterationState.short_tokens`."""
        state = self._state(now_s)
        state.short_tokens, state.short_for_tbt_s = short_tokens, for_tbt_s
        return self.policy.plan(state).swap_out

    def may_preempt(self, live: LiveRequest) -> bool:
        """Whether somebody who runs could make way for `live`."""
        tbt_s = live.queued.slo.tbt_s
        if not self.can_swap or tbt_s is None:
            return False
        return any((known.tbt_s or math.inf) > tbt_s for known in self._known.values())

    # -- what the policy sees -----------------------------------------------------------------

    def _state(self, now_s: float) -> IterationState:
        running = []
        for live in self._batch.requests:
            queued, known = live.queued, self._known[live.queued.request_id]
            known.context_tokens = queued.prefilled_tokens
            known.last_token_s = live.last_token_s
            if known.tbt_s is not None and queued.first_token_s is not None:
                known.next_token_due_s = queued.first_token_s + queued.output_tokens * known.tbt_s
            if known.gang is not None:
                gang = self._gangs[known.gang]
                known.shared_tokens = gang.shared_blocks * self._block_tokens if gang.n > 1 else 0
            running.append(known)
        return IterationState(
            now_s,
            running,
            self._costs,
            is_cascade=self._settings.cascade,
            prefill_load=self._turns.load(),
            is_hurried=self._turns.is_hurried,
        )

    def _totals(self, now_s: float) -> RunningTotals:
        batch = self._batch
        totals = RunningTotals(
            n=len(batch),
            context_tokens=batch.context_tokens + batch.parked_tokens,
            shared_tokens_saved=batch.shared_tokens_saved,
            decoded_s=min((live.last_token_s for live in batch.requests), default=now_s),
            n_parked=batch.n_parked,
        )
        for known in self._known.values():
            totals.add(known.tbt_s, 0)
        totals.n = len(batch)
        return totals

    def _add_to_gang(self, gang_id: int, tokens: Tokens) -> None:
        gang = self._gangs.get(gang_id)
        if gang is None:
            gang = self._gangs[gang_id] = _Gang(tokens, len(tokens))
        else:
            gang.shared_blocks = _common(gang.tokens, tokens, gang.shared_blocks)
        gang.n += 1


def selection_for(
    settings: InstanceSettings,
    batch: DecodeBatch,
    costs: CostModel,
    block_tokens: int,
    turns: PrefillTurns,
) -> DecodeSelection | None:
    """None if everyone always decodes. Raises ConfigError for an unknown policy."""
    if settings.iteration_policy == ALL_DECODE:
        return None
    return DecodeSelection(settings, batch, costs, block_tokens, turns)


def _common(first: Tokens, second: Tokens, limit: int) -> int:
    """Leading blocks that both have, at most `limit`."""
    limit = min(limit, len(first), len(second))
    for at in range(limit):
        if first[at] != second[at]:
            return at
    return limit
