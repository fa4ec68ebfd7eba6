"""How many prefill tokens the decode slack leaves room for (Niyama's dynamic chunks).

The rules are those of `pass_budget.py`; here decode slack is that of the requests that decode, of
which there may be fewer than run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice

from tiered_kv.scheduler.iteration_batch import Packing
from tiered_kv.scheduler.iteration_config import IterationConfig
from tiered_kv.scheduler.iteration_policy import IterationState
from tiered_kv.scheduler.pass_budget import (
    WORTH_SHARE,
    PassBudget,
    arrivals_limit_s,
    chunk_tokens,
    least_piece,
)

#: Prefill's turn is at least what is worth a pass, and at least this many tokens.
LEAST_TOKENS = 64
#: So many of those who wait are looked at.
QUEUE_LOOK = 64
#: Of these, so many must be late for token objectives' sake before these give way.
LATE_MIN = 2


def prefill_tokens(
    state: IterationState, batch: Packing, needed_s: float, left_s: float, config: IterationConfig
) -> int | None:
    """For the iteration in which, or before which, `batch` decodes; None if nothing asks for it.

    needed_s: of the decode that has to follow a prefill which runs alone. left_s: seconds until
    the first of its tokens is due.
    """
    prefill = state.prefill
    if prefill is None:
        return None
    is_mixed = state.is_mixed
    seconds = left_s
    has_turn = is_mixed or state.decoded_last
    if not is_mixed:
        seconds -= needed_s
        if has_turn:
            # Else nobody would be admitted while decoding takes all that its objectives allow.
            seconds = max(seconds, needed_s / 2.0)
    unfinished = prefill.unfinished
    cached = 0 if unfinished is None else unfinished.prefilled_tokens
    wanted_s = config.pass_share * prefill.least_ttft_s
    seconds = min(seconds, arrivals_limit_s(prefill, cached, wanted_s, needed_s))
    context, n_decodes = (batch.tokens_read, len(batch.chosen)) if is_mixed else (0, 0)
    least_tokens = 0
    if has_turn:
        # Far into a long prompt few tokens take longer than all the decodes, and are worth it.
        least_tokens, _ = least_piece(prefill, cached, WORTH_SHARE, LEAST_TOKENS)
    budget = PassBudget(seconds, 1.0, context, n_decodes, least_tokens, is_mixed)
    return chunk_tokens(prefill, budget, cached, 0, math.inf)


def is_queue_late(state: IterationState, tokens: int | None, needed_s: float) -> bool:
    """Whether first tokens that could be in time are late if each decode leaves room for `tokens`.

    By deadline, those aside that would be late even if nobody decoded. Such a pace can't be kept:
    the queue would grow, and all first tokens be late in the end. A single one is not worth
    everybody's pace. needed_s: of the decode between two chunks. O(n log n) in the first
    `QUEUE_LOOK` who wait.
    """
    prefill = state.prefill
    if prefill is None or not tokens:
        return False
    costs, unfinished = prefill.costs, prefill.unfinished
    cached = 0 if unfinished is None else unfinished.prefilled_tokens
    cycle_s = costs.iteration_s(((tokens, cached),), 0, 0) + needed_s
    slowdown = cycle_s / costs.marginal_prefill_s(tokens, cached)
    jobs = [
        (request.deadline_s, request.uncached_tokens, request.cached_tokens)
        for request in islice(prefill.waiting, QUEUE_LOOK)
        if not math.isinf(request.deadline_s)
    ]
    if unfinished is not None:
        left = max(1, unfinished.prompt_tokens - cached)
        jobs.append((unfinished.deadline_s, left, cached))
    alone_s = beside_s = 0.0
    n_late = 0
    for deadline_s, new, before in sorted(jobs):
        own_s, left_s = costs.marginal_prefill_s(new, before), deadline_s - state.now_s
        if alone_s + own_s > left_s:
            continue
        alone_s += own_s
        if (beside_s + own_s) * slowdown > left_s:
            n_late += 1
        else:
            beside_s += own_s
    return n_late >= LATE_MIN


def share_of(needed_s: float, left_s: float, others: Sequence[object], share: float) -> float:
    """`left_s`, less what is kept for `others` who decode if there is time."""
    if not others or math.isinf(left_s):
        return left_s
    return left_s - (1.0 - share) * max(0.0, left_s - needed_s)
