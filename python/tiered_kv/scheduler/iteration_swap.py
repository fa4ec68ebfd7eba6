"""Who makes room on the device: whose KV goes to the host, to come back without recompute.

The mechanism keeps what the host has already, so what a swap costs are the tokens that it lacks,
usually the newest pages (FastSwitch, arXiv 2411.18424). Who comes back first is not decided here:
they wait, with all their KV cached, and the request-level policy orders them with everyone else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tiered_kv.scheduler.iteration_policy import RunningRequest

#: How often a request makes way for others who wait; when memory runs out it may have to again.
SWAPS_MAX = 1


def choose_swap_out(
    running: Sequence[RunningRequest], short_tokens: int, for_tbt_s: float | None
) -> tuple[int, ...]:
    """Ids whose own KV makes up `short_tokens`, those who matter least first.

    for_tbt_s: the objective of a waiting request that the room is for (infinity: none): only looser
    ones make way, and nobody does if that is not enough. None: the running requests themselves
    lack it; then as many as it takes, but for one.

    Least: the loosest objective, then the least weight, then the fewest tokens to move for each one
    freed, then the most freed. O(n log n).
    """
    candidates = [
        r
        for r in running
        if r.can_park
        and r.can_swap
        and r.freed_tokens > 0
        and (for_tbt_s is None or _objective_s(r) > for_tbt_s)
    ]
    candidates.sort(key=_least_first)
    chosen: list[RunningRequest] = []
    freed = 0
    for request in candidates:
        if freed >= short_tokens:
            break
        chosen.append(request)
        freed += request.freed_tokens
    if freed < short_tokens and for_tbt_s is not None:
        return ()
    if for_tbt_s is None and len(chosen) == len(running):
        freed -= chosen.pop().freed_tokens
    # The last may be so large that some before it are not needed.
    for request in reversed(chosen[:-1]):
        if freed - request.freed_tokens >= short_tokens:
            chosen.remove(request)
            freed -= request.freed_tokens
    return tuple(request.request_id for request in chosen)


def _objective_s(request: RunningRequest) -> float:
    return math.inf if request.tbt_s is None else request.tbt_s


def _least_first(request: RunningRequest) -> tuple[float, float, float, int]:
    freed = request.freed_tokens
    to_move = max(0, freed - request.host_tokens) / freed
    return -_objective_s(request), request.weight, to_move, -freed
