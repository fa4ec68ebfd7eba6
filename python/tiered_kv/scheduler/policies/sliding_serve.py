"""SlidingServe (arXiv 2606.05933): chunks over two iterations, and a knapsack where it burns.

Built from the paper's description; the levels and the grain of the search are ours.

- Order, level by level: those whose deadline comes before the window of two iterations is over by
  least slack, those who can be in time by shortest work, those who cannot by arrival.
- Where not all who are at risk can be in time, dynamic programming chooses those that can: the most
  of them by 0/1 knapsack, each weighing its work, into the time until the last one's deadline.
- Chunk: of the splits over this iteration and the next, in which nobody's next two tokens are late,
  the one with most prefill in both, found by ternary search. It needs iterations that mix prefill
  and decode.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from heapq import nsmallest

from tiered_kv.memory.read_order import Urgency
from tiered_kv.scheduler.cost_search import most_within
from tiered_kv.scheduler.plan import AdmissionPlan, PrefillRoom
from tiered_kv.scheduler.prefill_room import MIN_CHUNK_TOKENS, begun_tokens
from tiered_kv.scheduler.prompts_ahead import STEP_TOKENS
from tiered_kv.scheduler.request import QueuedRequest
from tiered_kv.scheduler.request_policy import QuietPolicy, SchedulerState

#: Requests at risk among which the knapsack chooses, and the steps in which their work is counted.
AT_RISK_MAX, KNAPSACK_STEPS = 24, 128
#: Thirds are cut off so many times: 1% of a chunk is left.
SEARCH_STEPS = 11


class SlidingServe(QuietPolicy):
    """Keeps nothing from one plan to the next."""

    def plan(self, state: SchedulerState, limit: int) -> AdmissionPlan:
        """See `RequestPolicy.plan`."""
        window_s = 2.0 * state.costs.iteration_s(
            ((state.chunk_tokens, 0),), state.decode_context_tokens, len(state.running)
        )
        costs, now_s = state.costs, state.now_s
        work_s = {
            request.request_id: costs.prefill_s(request.uncached_tokens, request.cached_tokens)
            for request in state.candidates()
        }

        def key(request: QueuedRequest) -> tuple[int, float]:
            slack_s = request.deadline_s - now_s - work_s[request.request_id]
            if slack_s < 0:
                return 2, request.arrival_s
            if request.deadline_s - now_s <= window_s:
                return 0, slack_s
            return 1, work_s[request.request_id]

        order = nsmallest(max(limit, AT_RISK_MAX), state.candidates(), key=key)
        order = _saved_first(order, [key(request)[0] == 0 for request in order], work_s, now_s)
        ids = tuple(request.request_id for request in order[:limit])
        return AdmissionPlan(ids, room=self._room(state), mix_decodes=state.can_mix)

    def urgency(self, request: QueuedRequest) -> Urgency:
        """By deadline, then by arrival."""
        return request.deadline_s, request.arrival_s

    @staticmethod
    def _room(state: SchedulerState) -> PrefillRoom:
        """Of this iteration. None of it before those who cannot decode beside it had their turn."""
        running = state.running
        if running and not state.can_mix and not state.turns.decoded_last:
            return PrefillRoom(0)
        first_s, second_s = _due(state)
        if math.isinf(first_s):
            return PrefillRoom()
        cached, n, context = begun_tokens(state), len(running), state.decode_context_tokens
        most = max(1, state.chunk_tokens // STEP_TOKENS)

        def pass_s(steps: int, before: int = 0) -> float:
            begun = cached + before * STEP_TOKENS
            return state.costs.iteration_s(((steps * STEP_TOKENS, begun),), context, n)

        def within(seconds: float, before: int = 0) -> int:
            decode_s, high_s = state.costs.iteration_s((), context, n), pass_s(most, before)
            if high_s <= seconds:
                return most
            return most_within(lambda k: pass_s(k, before), seconds, most, decode_s, high_s)

        def both(steps: int) -> int:
            return steps + within(second_s - (pass_s(steps) if steps else 0.0), steps)

        low, high = 0, within(first_s)
        for _ in range(SEARCH_STEPS):
            third = (high - low) // 3
            if not third:
                break
            if both(low + third) <= both(high - third):
                low += third
            else:
                high -= third
        best = max(range(low, high + 1), key=lambda steps: (both(steps), steps))
        return PrefillRoom(max(best * STEP_TOKENS, MIN_CHUNK_TOKENS) + n)


def _due(state: SchedulerState) -> tuple[float, float]:
    """Seconds until the first of the next tokens is due, and of those after them."""
    first_s = second_s = math.inf
    for request in state.running:
        tbt_s = request.slo.tbt_s
        if tbt_s is not None:
            # One that is late already cannot be helped by stopping everyone else.
            left_s = max(request.next_token_deadline_s - state.now_s, tbt_s)
            first_s, second_s = min(first_s, left_s), min(second_s, left_s + tbt_s)
    return first_s, second_s


def _saved_first(
    order: Sequence[QueuedRequest],
    is_at_risk: Sequence[bool],
    work_s: dict[int, float],
    now_s: float,
) -> list[QueuedRequest]:
    """`order`, with those at risk who can be saved together in front, by deadline."""
    risky = [request for request, at_risk in zip(order, is_at_risk, strict=True) if at_risk]
    risky = risky[:AT_RISK_MAX]
    if len(risky) < 2:
        return list(order)
    room_s = max(request.deadline_s for request in risky) - now_s
    if sum(work_s[request.request_id] for request in risky) <= room_s:
        return list(order)
    step_s = room_s / KNAPSACK_STEPS
    best: list[tuple[int, ...]] = [()] * (KNAPSACK_STEPS + 1)
    for index, request in enumerate(risky):
        weight = max(1, math.ceil(work_s[request.request_id] / step_s))
        for at in range(KNAPSACK_STEPS, weight - 1, -1):
            taken = best[at - weight]
            if len(taken) + 1 > len(best[at]):
                best[at] = (*taken, index)
    saved = sorted((risky[index] for index in best[-1]), key=lambda one: one.deadline_s)
    chosen = {request.request_id for request in saved}
    return saved + [request for request in order if request.request_id not in chosen]
