"""How long the next iteration may take, and how many prefill tokens that is.

It ends before any running request's next token is late (Niyama's and Sarathi's chunks by slack),
and it is short against the tightest first-token objective: who arrives meanwhile waits for its end.
Nobody may arrive, though, so for that alone a prompt is not cut so small that it takes longer. And
where a next token will be late whatever the chunk, or can't be in time even alone on the machine,
the chunk is not made smaller for it than is worth a pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

from tiered_kv.scheduler.request_policy import SchedulerState
from tiered_kv.scheduler.slack import least_token_slack_s

#: Fewer tokens than this are not worth an iteration.
MIN_CHUNK_TOKENS = 256
#: Nor are so few that a prompt takes so much longer, as a share, in pieces of that size.
WORTH_SHARE = 0.15
#: The tokens are found to this precision.
STEP_TOKENS = 64
#: A prompt may take so much longer, as a share, for being cut up for those who may arrive.
CUTTING_SHARE = 0.03
#: Prefill waits for at most so many decodes in a row that gain it room.
DECODES_AHEAD = 4
#: Of the time until the next token is due, this share is used: predictions are not exact.
CAUTION = 0.94


class BudgetRules(Protocol):
    """What of the policy's configuration counts here."""

    @property
    def slack(self) -> bool: ...
    @property
    def mix_decodes(self) -> bool: ...
    @property
    def pass_share(self) -> float: ...


@dataclass(frozen=True, slots=True)
class PassBudget:
    """Limits of one iteration."""

    seconds: float
    """Longest that it may take; infinity if nothing limits it."""
    slowdown: float
    """Seconds per second of prefill work, with those decodes that go on beside or between."""
    context_tokens: int
    """Of those that decode in the same iteration."""
    n_decodes: int
    least_tokens: int
    """Prefill tokens that are computed whatever the time."""
    mix_decodes: bool
    """Whether those who run decode in the same iteration."""
    saves_up: bool = False
    """A few decodes leave more time soon. Until then a prompt is computed only if it fits whole."""


class DecodeWatch:
    """When those who run got their last tokens, as far as plans were asked for meanwhile."""

    def __init__(self) -> None:
        self.decoded_s = 0.0
        self.in_a_row = 0
        """Decodes since the last prefill."""
        self._context_tokens = 0
        self._prefilled_tokens = 0

    def look(self, state: SchedulerState) -> None:
        """Contexts grow with every token, and by those whose prefill ended: no decode, hence -1."""
        if state.processed_prefill_tokens != self._prefilled_tokens:
            self._prefilled_tokens, self.in_a_row = state.processed_prefill_tokens, -1
        if state.decode_context_tokens != self._context_tokens:
            self._context_tokens, self.decoded_s = state.decode_context_tokens, state.now_s
            self.in_a_row += 1


def pass_budget(state: SchedulerState, rules: BudgetRules, decodes: DecodeWatch) -> PassBudget:
    """For the next iteration.

    Where a few decodes gain enough time for a prefill that is worth a pass, it waits for them.
    Where decoding alone takes as long as its objectives allow, prefill still has its turn after
    each decode, a third of the time: else nobody would be admitted until they are done. O(running).
    """
    costs = state.costs
    n_running = len(state.running)
    context = state.decode_context_tokens
    decode_s = costs.iteration_s((), context, n_running) if n_running else 0.0
    is_mixed = rules.mix_decodes and costs.device.mixes_decodes
    has_turn = is_mixed or not n_running or decodes.decoded_s >= state.now_s
    cached = 0 if state.unfinished is None else state.unfinished.prefilled_tokens
    least_tokens, least_s = least_piece(state, cached, WORTH_SHARE)
    seconds, saves_up = math.inf, False
    if rules.slack:
        # In a mixed iteration they get their tokens, if late; else they might wait for many.
        possible_s = costs.iteration_s((), 0, 1) if is_mixed else 0.0
        seconds = least_token_slack_s(
            state.running, state.now_s, decodes.decoded_s, CAUTION, possible_s
        )
        if not is_mixed:
            # They decode once more after it.
            seconds -= decode_s
            wanted_s = least_s - seconds
            # Predictions are not exact: in the end prefill has its turn whatever was gained.
            saves_up = (
                wanted_s > 0
                and decodes.in_a_row < DECODES_AHEAD
                and _decodes_make_room(state, wanted_s, decode_s)
            )
            has_turn = has_turn and not saves_up
            if has_turn:
                seconds = max(seconds, decode_s / 2.0)
        seconds = min(
            seconds,
            arrivals_limit_s(state, cached, rules.pass_share * state.least_ttft_s, decode_s),
        )
    n_decodes, context = (n_running, context) if is_mixed else (0, 0)
    least_tokens = least_tokens if has_turn else 0
    budget = PassBudget(seconds, 1.0, context, n_decodes, least_tokens, is_mixed)
    tokens, slowdown = chunk_tokens(state, budget, 0, 0, math.inf), 1.0
    if tokens > 0:
        alone_s = costs.marginal_prefill_s(tokens)
        beside_s = costs.iteration_s(((tokens, 0),), context, n_decodes)
        slowdown = max(1.0, beside_s / alone_s)
    return replace(budget, slowdown=slowdown, saves_up=saves_up)


def _decodes_make_room(state: SchedulerState, wanted_s: float, decode_s: float) -> bool:
    """Whether a few decodes, each sooner than its tokens are due, gain `wanted_s` of slack."""
    objectives = (request.slo.tbt_s for request in state.running)
    least_s = min((tbt_s for tbt_s in objectives if tbt_s is not None), default=math.inf)
    return wanted_s <= DECODES_AHEAD * (CAUTION * least_s - decode_s)


def arrivals_limit_s(state: SchedulerState, cached: int, wanted_s: float, decode_s: float) -> float:
    """Longest iteration for the sake of who may arrive meanwhile and wait for its end.

    wanted_s: short against their objectives; infinity if nobody had any. decode_s: of a decode of
    all who run, which comes in between. Never so short that a prompt, `cached` tokens of which are
    there, would take noticeably longer in such pieces than in the longest that are configured.
    """
    wanted_s = max(wanted_s, 2.0 * decode_s)
    if math.isinf(wanted_s):
        return wanted_s
    return max(wanted_s, least_piece(state, cached, CUTTING_SHARE)[1])


def least_piece(
    state: SchedulerState, cached: int, share: float, floor: int = MIN_CHUNK_TOKENS
) -> tuple[int, float]:
    """The least tokens in pieces of which the longest chunk takes at most `share` longer.

    cached: tokens of the prompt that are there. floor: no fewer. Returns seconds of such a piece,
    too.
    """
    most = max(state.chunk_tokens, floor)

    def piece_s(tokens: int) -> float:
        """Of the piece in the middle, which attends to as much as the average one."""
        return state.costs.iteration_s(((tokens, cached + (most - tokens) // 2),), 0, 0)

    tokens, whole_s = floor, piece_s(most)
    while tokens < most:
        seconds = piece_s(tokens)
        if seconds * -(-most // tokens) <= (1.0 + share) * whole_s:
            return tokens, seconds
        tokens *= 2
    return most, whole_s


def chunk_tokens(
    state: SchedulerState, budget: PassBudget, cached: int, first_tokens: int, due_s: float
) -> int:
    """Prefill tokens, beside `budget.n_decodes` that decode, that the budget has room for.

    cached: tokens before the first chunk. first_tokens, due_s: what the first request needs, and
    in how many seconds it is due; nobody joins it if that would make it late. 0: no prefill now.
    """
    high = max(state.chunk_tokens, MIN_CHUNK_TOKENS)
    seconds = budget.seconds
    if budget.saves_up and not 0 < _seconds(state, budget, first_tokens, cached) <= seconds:
        return 0
    if first_tokens and first_tokens < high:
        alone_s = _seconds(state, budget, first_tokens, cached)
        if alone_s <= due_s:
            seconds = min(seconds, max(due_s, alone_s))
    tokens = _largest(state, budget, cached, high, seconds)
    if tokens < MIN_CHUNK_TOKENS:
        tokens = budget.least_tokens
    # The chunk's limit counts decoding requests, too.
    return tokens + budget.n_decodes if tokens else 0


def _largest(
    state: SchedulerState, budget: PassBudget, cached: int, high: int, seconds: float
) -> int:
    if math.isinf(seconds) or _seconds(state, budget, high, cached) <= seconds:
        return high
    low = 0
    while high - low > STEP_TOKENS:
        middle = (low + high) // 2
        if _seconds(state, budget, middle, cached) <= seconds:
            low = middle
        else:
            high = middle
    return low


def _seconds(state: SchedulerState, budget: PassBudget, tokens: int, cached: int) -> float:
    if tokens <= 0:
        return 0.0
    return state.costs.iteration_s(((tokens, cached),), budget.context_tokens, budget.n_decodes)
