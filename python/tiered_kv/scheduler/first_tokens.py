"""Whether those who wait get their first tokens in time at some pace of prefill."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice

from tiered_kv.scheduler.request_policy import SchedulerState
from tiered_kv.scheduler.waiting import QUEUE_LOOK

#: Those who wait are in no hurry while their turns take this share of the time until they are due.
HURRY_SHARE = 0.25
#: Of these, so many must be late for token objectives' sake before these give way.
LATE_MIN = 2


def is_queue_late(
    state: SchedulerState,
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
    costs, unfinished = state.costs, state.unfinished
    jobs = [
        (request.deadline_s, request.uncached_tokens, request.cached_tokens)
        for request in islice(state.waiting, QUEUE_LOOK)
        if not math.isinf(request.deadline_s)
    ]
    if unfinished is not None:
        left = max(1, unfinished.unprefilled_tokens)
        jobs.append((unfinished.deadline_s, left, unfinished.prefilled_tokens))
    if len(jobs) < LATE_MIN:
        return False
    cycle_s = costs.iteration_s(chunks, 0, 0) + needed_s
    slowdown = cycle_s / sum(costs.marginal_prefill_s(new, cached) for new, cached in chunks)
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
