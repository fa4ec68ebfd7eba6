"""Slack: how long a request can still wait and be in time, and who gets to be in time.

Slack = deadline - now - predicted remaining time. Its order does not change as time passes, so it
is kept as the latest start: deadline - predicted time.

When not everyone can be in time, the question is who. Moore (Management Science 15, 1968, with
Hodgson's algorithm) answers it for one machine: take jobs by deadline, and whenever one would be
late, leave out the longest so far. That makes the number of late jobs as small as it can be, where
least slack or earliest deadline alone let one long job make all behind it late.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tiered_kv.core.ids import Tier
from tiered_kv.scheduler.cost_model import CostModel
from tiered_kv.scheduler.request import QueuedRequest
from tiered_kv.scheduler.request_policy import SchedulerState


@dataclass(frozen=True, slots=True)
class Price:
    """What it takes to give a request its first token, by the cost model."""

    compute_s: float
    """Seconds of prefill that it adds to forward passes."""
    load_s: float
    """Seconds to bring its pages from the host, behind nothing."""
    work_s: float
    """Seconds of the device: the longer, as pages arrive layer by layer while it computes."""

    def takes_s(self, slowdown: float, queued_s: float = 0.0) -> float:
        """Seconds until that token, where a second of prefill work takes `slowdown` seconds.

        queued_s: seconds of loads before its own. Loads are no slower in passes with more in them,
        or with little but their fixed part.
        """
        load_s = self.load_s + queued_s if self.load_s else 0.0
        return max(self.compute_s * slowdown, load_s)


def price(request: QueuedRequest, costs: CostModel, more_on_host: int = 0) -> Price:
    """By what is cached of `request` now, wherever, and `more_on_host` tokens."""
    load_s = 0.0
    host_tokens = request.host_tokens + more_on_host
    if host_tokens:
        n_bytes = int(host_tokens * costs.host_bytes_per_token)
        load_s = costs.load_s(Tier.HOST, Tier.DEVICE, n_bytes)
    new_tokens = max(1, request.uncached_tokens - more_on_host)
    compute_s = costs.marginal_prefill_s(new_tokens, request.cached_tokens + more_on_host)
    return Price(compute_s, load_s, max(compute_s, load_s))


def token_due_s(request: QueuedRequest) -> float:
    """When its next token is due: the first one, or after a retraction the one that is missing."""
    if not request.output_tokens:
        return request.deadline_s
    tbt_s = request.slo.tbt_s
    if tbt_s is None or request.first_token_s is None:
        return math.inf
    return request.first_token_s + request.output_tokens * tbt_s


def queued_load_s(state: SchedulerState) -> float:
    """Seconds until what is on the way from the host to the device has arrived."""
    if not state.loading_bytes:
        return 0.0
    return state.costs.load_s(Tier.HOST, Tier.DEVICE, state.loading_bytes)


@dataclass(frozen=True, slots=True)
class Job:
    """One candidate for being in time."""

    request_id: int
    work_s: float
    """Seconds until its first token, if it is served at once and alone."""
    deadline_s: float
    weight: float = 1.0
    """Of two that cannot both be in time, the one with less work per weight is."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Who can be in time."""

    in_time: tuple[Job, ...]
    """By deadline: served in this order, all of them are."""
    left_out: tuple[Job, ...]
    """The rest."""

    @property
    def weight(self) -> float:
        """Of those in time, together."""
        return sum(job.weight for job in self.in_time)


def select_in_time(jobs: Sequence[Job], now_s: float) -> Selection:
    """As many of `jobs` as can be in time one after the other, from `now_s` on. O(n log n).

    jobs: by deadline. With equal weights the number of late jobs is the least possible.
    """
    kept: list[tuple[float, int]] = []  # (-work per weight, index)
    out: set[int] = set()
    end_s = now_s
    for index, job in enumerate(jobs):
        end_s += job.work_s
        heapq.heappush(kept, (-job.work_s / job.weight, index))
        while end_s > job.deadline_s and kept:
            _, longest = heapq.heappop(kept)
            out.add(longest)
            end_s -= jobs[longest].work_s
    return Selection(
        tuple(job for index, job in enumerate(jobs) if index not in out),
        tuple(job for index, job in enumerate(jobs) if index in out),
    )


def select_beside(
    jobs: Sequence[Job], begun: Job, now_s: float, *, may_put_back: bool
) -> tuple[Selection, bool]:
    """As `select_in_time` while `begun` is under way, and whether to put it back.

    It should if that keeps more deadlines, by weight, than going on does, its own included, and if
    it would not be the first in any case. Returned are those in time besides it.
    """
    going_on = select_in_time(jobs, now_s + begun.work_s)
    if not may_put_back or not going_on.left_out:
        return going_on, False
    everyone, kept = jobs, going_on.weight
    if now_s + begun.work_s <= begun.deadline_s < math.inf:
        everyone = sorted([*jobs, begun], key=lambda job: job.deadline_s)
        kept += begun.weight
    anew = select_in_time(everyone, now_s)
    if anew.weight <= kept or anew.in_time[0] is begun:
        return going_on, False
    in_time = tuple(job for job in anew.in_time if job is not begun)
    return Selection(in_time, tuple(job for job in anew.left_out if job is not begun)), True


def least_token_slack_s(
    running: Iterable[QueuedRequest],
    now_s: float,
    decoded_s: float,
    share: float = 1.0,
    least_tbt_s: float = 0.0,
) -> float:
    """Seconds until the first of their next tokens is due, if mean gaps are to hold.

    Counted from each one's first token, so that what was gained before can be spent. One that is
    behind cannot be helped by stopping everybody else: it gets one interval from `decoded_s` on,
    the last time they all got a token. Infinity if nobody has an objective; negative if it is
    late. share: of the objectives, to keep some of them in hand. least_tbt_s: tighter ones than
    this don't count, because nobody could keep them.
    """
    least_s = math.inf
    for request in running:
        tbt_s = request.slo.tbt_s
        if tbt_s is None:
            continue
        tbt_s *= share
        if tbt_s < least_tbt_s:
            continue
        due_s = decoded_s + tbt_s
        first_s = request.first_token_s
        if first_s is not None:
            due_s = max(due_s, first_s + request.output_tokens * tbt_s)
        least_s = min(least_s, due_s)
    return least_s - now_s
