"""How many prefill tokens the decode slack leaves room for (Niyama's dynamic chunks).

The rules are those of `pass_budget.py`; here decode slack is that of the requests that decode, of
which there may be fewer than run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tiered_kv.scheduler.iteration_batch import Packing
from tiered_kv.scheduler.iteration_config import IterationConfig
from tiered_kv.scheduler.iteration_policy import IterationState
from tiered_kv.scheduler.pass_budget import MIN_CHUNK_TOKENS, PassBudget, chunk_tokens

#: Prefill's turn is at least this many tokens, whatever they take.
LEAST_TOKENS = 64


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
    if not math.isinf(state.least_ttft_s):
        seconds = min(seconds, max(config.pass_share * state.least_ttft_s, 2.0 * needed_s))
    unfinished = prefill.unfinished
    cached = 0 if unfinished is None else unfinished.prefilled_tokens
    context, n_decodes = (batch.tokens_read, len(batch.chosen)) if is_mixed else (0, 0)
    least_tokens = 0
    if has_turn:
        least_tokens = MIN_CHUNK_TOKENS
        # Far into a long prompt even these take longer than all the decodes.
        while least_tokens > LEAST_TOKENS and (
            prefill.costs.iteration_s(((least_tokens, cached),), context, n_decodes) > seconds
        ):
            least_tokens //= 2
    budget = PassBudget(seconds, 1.0, context, n_decodes, least_tokens)
    return chunk_tokens(prefill, budget, cached, 0, math.inf)


def share_of(needed_s: float, left_s: float, others: Sequence[object], share: float) -> float:
    """`left_s`, less what is kept for `others` who decode if there is time."""
    if not others or math.isinf(left_s):
        return left_s
    return left_s - (1.0 - share) * max(0.0, left_s - needed_s)
