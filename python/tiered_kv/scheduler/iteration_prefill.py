"""How much is prefilled before, or beside, the next decode (Niyama's dynamic chunks).

The rules are those of `pass_budget.py`; here decode slack is that of the requests that decode, of
which there may be fewer than run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from tiered_kv.scheduler.iteration_batch import Packing
from tiered_kv.scheduler.iteration_config import IterationConfig
from tiered_kv.scheduler.iteration_policy import IterationState
from tiered_kv.scheduler.pass_budget import (
    MIN_CHUNK_TOKENS,
    WORTH_SHARE,
    PassBudget,
    arrivals_limit_s,
    chunk_tokens,
    least_piece,
)
from tiered_kv.scheduler.prompts_ahead import Piece, PromptsAhead

#: Beside decodes, prefill is at least what is worth a pass, and at least this many tokens.
LEAST_TOKENS = 64
#: So many of those who wait are looked at.
QUEUE_LOOK = 64
#: Those who wait are in no hurry while their turns take this share of the time until they are due.
HURRY_SHARE = 0.25
#: Then prompts may take so much longer, as a share, in pieces that let decodes come sooner.
PATIENT_SHARE = 1.0
#: Of these, so many must be late for token objectives' sake before these give way.
LATE_MIN = 2


@dataclass(frozen=True, slots=True)
class PrefillRoom:
    """What the decodes leave to prefill."""

    tokens: int | None = None
    """At most; see `IterationPlan.prefill_tokens`."""
    admit_at_most: int | None = None
    """See `IterationPlan.admit_at_most`."""


def prompts_ahead(state: IterationState) -> PromptsAhead | None:
    """What a prefill that runs alone could compute; None if there is nothing, or it is mixed."""
    if state.prefill is None or state.is_mixed:
        return None
    return PromptsAhead(state.prefill) or None


def prefill_room(
    state: IterationState,
    ahead: PromptsAhead | None,
    batch: Packing,
    needed_s: float,
    left_s: float,
    config: IterationConfig,
) -> PrefillRoom | None:
    """For the iteration in which, or before which, `batch` decodes.

    ahead: `prompts_ahead` of the state. needed_s: of the decode that has to follow a prefill which
    runs alone. left_s: seconds until the first of its tokens is due. None: if this held, first
    tokens would be late for it.
    """
    prefill = state.prefill
    if prefill is None:
        return PrefillRoom()
    if state.is_mixed:
        tokens = _tokens_beside(state, batch, needed_s, left_s, config)
        chunks = ((tokens, _begun_tokens(state)),)
        if tokens and config.yields and is_queue_late(state, chunks, needed_s):
            return None
        return PrefillRoom(tokens)
    if ahead is None:
        return PrefillRoom()
    return _room_before(state, ahead, needed_s, left_s, config)


def _tokens_beside(
    state: IterationState, batch: Packing, needed_s: float, left_s: float, config: IterationConfig
) -> int:
    prefill = state.prefill
    assert prefill is not None
    cached = _begun_tokens(state)
    wanted_s = config.pass_share * prefill.least_ttft_s
    seconds = min(left_s, arrivals_limit_s(prefill, cached, wanted_s, needed_s))
    # Far into a long prompt few tokens take longer than all the decodes, and are worth it.
    least_tokens, _ = least_piece(prefill, cached, WORTH_SHARE, LEAST_TOKENS)
    n_decodes = len(batch.chosen)
    budget = PassBudget(seconds, 1.0, batch.tokens_read, n_decodes, least_tokens, mix_decodes=True)
    return chunk_tokens(prefill, budget, cached, 0, math.inf)


def _room_before(
    state: IterationState,
    ahead: PromptsAhead,
    needed_s: float,
    left_s: float,
    config: IterationConfig,
) -> PrefillRoom | None:
    """Prefill has its turn after each decode, whatever time that leaves: else nobody would be
    admitted while decoding takes all that its objectives allow. How much, follows from the queue:
    less than is worth a pass while nobody in it is in a hurry, so that decodes come sooner.
    """
    prefill = state.prefill
    assert prefill is not None
    wanted_s = config.pass_share * prefill.least_ttft_s
    limit_s = arrivals_limit_s(prefill, _begun_tokens(state), wanted_s, needed_s)
    seconds = left_s - needed_s
    if state.decoded_last:
        seconds = max(seconds, needed_s / 2.0)
    fits = ahead.within(min(seconds, limit_s))
    worth = ahead.worth_a_pass(WORTH_SHARE)
    enough = min(worth.tokens, MIN_CHUNK_TOKENS)
    if fits is not None and fits.tokens >= enough:
        return _room(state, ahead, fits, needed_s, config)
    if not state.decoded_last:
        return PrefillRoom(0)
    least = ahead.worth_a_pass(PATIENT_SHARE)
    if fits is not None and fits.tokens > least.tokens:
        least = fits
    if is_queue_late(state, least.chunks, needed_s, HURRY_SHARE):
        least = worth
    return _room(state, ahead, least, needed_s, config)


def _room(
    state: IterationState,
    ahead: PromptsAhead,
    piece: Piece,
    needed_s: float,
    config: IterationConfig,
) -> PrefillRoom | None:
    if config.yields and is_queue_late(state, piece.chunks, needed_s):
        return None
    if piece.tokens == ahead.whole.tokens:
        assert state.prefill is not None
        return PrefillRoom(max(piece.tokens, state.prefill.chunk_tokens))
    return PrefillRoom(piece.tokens, piece.n_admitted)


def is_hurried(state: IterationState, ahead: PromptsAhead | None, all_s: float) -> bool:
    """Whether throughput counts more than token objectives, for the sake of who waits.

    That is so if first tokens need more than a share of the time they have, even if everybody
    decodes, in `all_s`, between two prefills: whoever is parked decodes later, at a higher price.
    """
    if state.prefill is None:
        return state.is_hurried
    if state.is_mixed:
        # A pass that leaves somebody out is one that computes less of the prompts, too.
        return True
    if ahead is None:
        return False
    worth = ahead.worth_a_pass(WORTH_SHARE)
    return is_queue_late(state, worth.chunks, all_s, HURRY_SHARE)


def is_queue_late(
    state: IterationState,
    chunks: Sequence[tuple[int, int]],
    needed_s: float,
    share: float = 1.0,
) -> bool:
    """Whether first tokens that could be in time are late if each decode leaves room for `chunks`.

    By deadline, those aside that would be late even if nobody decoded. Such a pace can't be kept:
    the queue would grow, and all first tokens be late in the end. A single one is not worth
    everybody's pace. chunks: (new, cached) tokens. needed_s: of the decode between two of these.
    share: of the time until they are due, what those who wait now may take: others will come.
    O(n log n) in the first `QUEUE_LOOK` who wait.
    """
    prefill = state.prefill
    if prefill is None:
        return False
    costs, unfinished = prefill.costs, prefill.unfinished
    cycle_s = costs.iteration_s(chunks, 0, 0) + needed_s
    slowdown = cycle_s / sum(costs.marginal_prefill_s(new, cached) for new, cached in chunks)
    jobs = [
        (request.deadline_s, request.uncached_tokens, request.cached_tokens)
        for request in islice(prefill.waiting, QUEUE_LOOK)
        if not math.isinf(request.deadline_s)
    ]
    if unfinished is not None:
        left = max(1, unfinished.prompt_tokens - unfinished.prefilled_tokens)
        jobs.append((unfinished.deadline_s, left, unfinished.prefilled_tokens))
    alone_s = beside_s = 0.0
    n_late = 0
    for deadline_s, new, before in sorted(jobs):
        own_s, left_s = costs.marginal_prefill_s(new, before), deadline_s - state.now_s
        if alone_s + own_s > left_s:
            continue
        alone_s += own_s
        if (beside_s + own_s) * slowdown > share * left_s:
            n_late += 1
        else:
            beside_s += own_s
    return n_late >= LATE_MIN


def _begun_tokens(state: IterationState) -> int:
    """What is there of the prompt that was begun."""
    unfinished = None if state.prefill is None else state.prefill.unfinished
    return 0 if unfinished is None else unfinished.prefilled_tokens


def share_of(needed_s: float, left_s: float, others: Sequence[object], share: float) -> float:
    """`left_s`, less what is kept for `others` who decode if there is time."""
    if not others or math.isinf(left_s):
        return left_s
    return left_s - (1.0 - share) * max(0.0, left_s - needed_s)
