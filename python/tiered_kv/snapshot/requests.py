"""Who waits, runs and is parked, as rows of plain values: so many of them, and how many in all."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from tiered_kv.forest.node import Node
from tiered_kv.scheduler.request import QueuedRequest
from tiered_kv.snapshot.prefixes import place_of, place_on

#: Most requests of each kind in one snapshot.
WAITING_MAX = 32
RUNNING_MAX = 48
#: Nodes looked at to find the shown prefix that a request goes on from.
STEPS_MAX = 24

NAME_CHARACTERS = 40

#: One request: name, class, tenant, tokens of its prompt, tokens produced, tokens cached, seconds
#: since it arrived, slack in seconds or None, the prefix that it goes on from or None.
Row = tuple[Any, ...]


def waiting_row(
    name: str,
    request: QueuedRequest,
    latest_start_s: float | None,
    now_s: float,
    shown: Collection[int],
) -> Row:
    """One who waits. latest_start_s: when it must start to be in time; None: it is not known."""
    return (
        name[:NAME_CHARACTERS],
        request.slo.slo_class,
        request.tenant,
        request.prompt_tokens,
        request.output_tokens,
        request.cached_tokens,
        now_s - request.arrival_s,
        _slack_s(latest_start_s, now_s),
        place_on(request.path, shown),
    )


def running_row(
    name: str,
    request: QueuedRequest,
    n_output: int,
    n_cached: int,
    now_s: float,
    shown: Collection[int],
    last: Node | None,
) -> Row:
    """One who runs, parked or not: its slack is until its next token is due. last: of its path."""
    return (
        name[:NAME_CHARACTERS],
        request.slo.slo_class,
        request.tenant,
        request.prompt_tokens,
        n_output,
        n_cached,
        now_s - request.arrival_s,
        _slack_s(_due_s(request, n_output), now_s),
        place_of(last, shown, STEPS_MAX),
    )


def _due_s(request: QueuedRequest, n_output: int) -> float | None:
    """When its next token is due, counted as the iteration policies do: from its first one on."""
    if not n_output:
        return request.deadline_s
    first_s, tbt_s = request.first_token_s, request.slo.tbt_s
    return None if first_s is None or tbt_s is None else first_s + n_output * tbt_s


def _slack_s(due_s: float | None, now_s: float) -> float | None:
    return None if due_s is None or not math.isfinite(due_s) else due_s - now_s
