"""This project's choice of who decodes: everyone when that fits, else by slack at a fixed pace.

1. If everyone's next token is in time when all decode, all decode.
2. Else the pace is found at which most requests are in time, and whether it is worth its price
   (`iteration_pace.py`). If none is, all decode.
3. At that pace: requests with the tightest objectives, and those that can't be parked, in every
   iteration; whoever has been parked for too long; then by slack those who would be late after one
   more iteration, whole gangs together; then those who got their last token the longest ago, as
   long as the iteration ends before the first token is late.

Docs: docs/scheduler.md, with what follows for the time that anyone can be parked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from tiered_kv.scheduler.cost_model import CostModel
from tiered_kv.scheduler.iteration_batch import Packing, with_gangs
from tiered_kv.scheduler.iteration_config import IterationConfig
from tiered_kv.scheduler.iteration_pace import (
    Pace,
    find_pace,
    is_in_every_iteration,
    max_park_s,
)
from tiered_kv.scheduler.iteration_policy import (
    IterationPlan,
    IterationState,
    RunningRequest,
    RunningTotals,
)
from tiered_kv.scheduler.iteration_room import IterationRoom, share_of
from tiered_kv.scheduler.iteration_swap import choose_swap_out

#: However much prefill there was, decoding is planned with at least the rest of the time.
PREFILL_LOAD_MAX = 0.5


class SlackIterations:
    """Stateless; work per plan O(n log n) in the running requests."""

    def __init__(self, config: IterationConfig | None = None) -> None:
        self.config = config or IterationConfig()

    def fits(self, totals: RunningTotals, costs: CostModel, now_s: float) -> bool:
        """Whether all decode in time, every objective being an interval from the last decode."""
        if totals.n_parked:
            return False
        tightest_s = totals.tightest_tbt_s
        if math.isinf(tightest_s) or not totals.n:
            return True
        seconds = costs.iteration_s((), totals.context_tokens, totals.n, totals.shared_tokens_saved)
        return now_s + seconds <= totals.decoded_s + self.config.caution * tightest_s

    def plan(self, state: IterationState) -> IterationPlan:
        """See `IterationPolicy.plan`."""
        swap_out: tuple[int, ...] = ()
        running: Sequence[RunningRequest] = state.running
        if state.short_tokens > 0:
            swap_out = choose_swap_out(running, state.short_tokens, state.short_for_tbt_s)
            leaving = set(swap_out)
            running = [r for r in running if r.request_id not in leaving]
        if not running:
            return IterationPlan(swap_out=swap_out)
        config = self.config
        everyone = Packing(state.costs, is_cascade=state.is_cascade)
        everyone.add(running)
        all_s = everyone.seconds
        left_s = min(due_s(request, config) for request in running) - state.now_s
        decode_s = left_s
        if state.prefill is not None and not state.is_mixed:
            # Those who need not decode each time leave room for the prefill before they do.
            decode_s *= 1.0 - _prefill_load(state)
        prefill = IterationRoom(state, config)
        hurried = prefill.is_hurried(all_s)
        if config.select and all_s > decode_s:
            pace = self._pace(state, running, hurried=hurried)
            if not math.isinf(pace.interval_s):
                return self._paced(state, prefill, running, pace, swap_out, hurried=hurried)
        room, _ = prefill.room(everyone, all_s, left_s, is_everyone=True)
        return IterationPlan(None, room, swap_out, hurried)

    def _pace(
        self, state: IterationState, running: Sequence[RunningRequest], *, hurried: bool
    ) -> Pace:
        """If there is none at which everyone is in time beside prefill, one between prefills."""
        for load in (_prefill_load(state), 0.0):
            pace = find_pace(
                running,
                state.costs,
                self.config,
                state.now_s,
                is_cascade=state.is_cascade,
                prefill_load=load,
                is_scarce=hurried,
            )
            if hurried or not math.isinf(pace.interval_s):
                break
        return pace

    def _paced(
        self,
        state: IterationState,
        prefill: IterationRoom,
        running: Sequence[RunningRequest],
        pace: Pace,
        swap_out: tuple[int, ...],
        *,
        hurried: bool,
    ) -> IterationPlan:
        config, now_s = self.config, state.now_s
        batch = Packing(state.costs, is_cascade=state.is_cascade)
        always, turns, spare = _parts(running, pace)
        due = (due_s(r, config) for r in always if _can_be(r, pace))
        left_s = min(min(due, default=math.inf) - now_s, pace.interval_s)
        batch.add(always)
        if batch.seconds > left_s:
            # Late already: whoever is left out would not change that. It gets one interval more,
            # less what prefill takes of it.
            left_s = max(batch.seconds, pace.interval_s * (1.0 - _prefill_load(state)))
        # The overdue decode whatever the time.
        batch.add(r for r in turns + spare if _is_overdue(r, now_s, config))
        turns = [r for r in turns if not _is_overdue(r, now_s, config)]
        spare = [r for r in spare if not _is_overdue(r, now_s, config)]
        urgent_s = now_s + left_s + pace.interval_s
        urgent = sorted((r for r in turns if due_s(r, config) < urgent_s), key=_by_due(config))
        spare += [r for r in turns if due_s(r, config) >= urgent_s]
        others = sorted(spare, key=_by_last_token)
        if state.is_cascade:
            urgent, others = with_gangs(urgent), with_gangs(others)
        others = batch.fill(urgent, left_s) + others
        needed_s = batch.seconds
        for_prefill_s = share_of(needed_s, left_s, others, config.prefill_share)
        fill_s = left_s
        if state.prefill is not None and state.is_mixed:
            fill_s -= for_prefill_s - needed_s
        parked = batch.fill(others, fill_s)
        limit_s = left_s if state.is_mixed else for_prefill_s
        room, is_queue_late = prefill.room(batch, needed_s, limit_s, is_everyone=not parked)
        if is_queue_late:
            return IterationPlan(swap_out=swap_out, is_hurried=True)
        chosen = tuple(r.request_id for r in batch.chosen) if parked else None
        return IterationPlan(chosen, room, swap_out, hurried)


def _prefill_load(state: IterationState) -> float:
    return min(state.prefill_load, PREFILL_LOAD_MAX)


def _parts(
    running: Sequence[RunningRequest], pace: Pace
) -> tuple[list[RunningRequest], list[RunningRequest], list[RunningRequest]]:
    """Those in every iteration, those who take turns, and those who get what time is left."""
    always, turns, spare = [], [], []
    for request in running:
        if request.request_id in pace.relegated:
            spare.append(request)
        elif is_in_every_iteration(request, pace.objective_s):
            always.append(request)
        else:
            turns.append(request)
    return always, turns, spare


def due_s(request: RunningRequest, config: IterationConfig) -> float:
    """When its next token is due, to plan with; without an objective, when it has to decode."""
    if request.tbt_s is None:
        return request.last_token_s + max_park_s(request, config)
    return request.last_token_s + config.caution * request.tbt_s


def _is_overdue(request: RunningRequest, now_s: float, config: IterationConfig) -> bool:
    """Whether it has been parked for as long as anyone may be."""
    return now_s - request.last_token_s >= max_park_s(request, config)


def _can_be(request: RunningRequest, pace: Pace) -> bool:
    """Whether this pace serves its objective."""
    return request.tbt_s is not None and request.tbt_s >= pace.objective_s


def _by_due(config: IterationConfig) -> Callable[[RunningRequest], tuple[float, int]]:
    return lambda request: (due_s(request, config), request.request_id)


def _by_last_token(request: RunningRequest) -> tuple[float, int]:
    return request.last_token_s, request.request_id
