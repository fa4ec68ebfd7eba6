"""The pace of decoding: how long an iteration may be so that the most objectives are met.

With a pace d, requests whose objective is under 2 d decode in every iteration, others in one of
every floor(objective / d), those without one often enough to keep the bound on parking. Whether
that can be kept up follows from the sums over all requests, so it is decided before anyone is
chosen: choosing who is most urgent in an iteration, without asking that, lets everybody take turns
at being late while the weights are read more often than for all at once.

What it must cost: an iteration reads the weights and takes its fixed part, f seconds, whoever
decodes. Of an iteration of d seconds the share 1 - f/d produces tokens, against 1 - f/T when all
decode in T > d seconds. So subsets give up the share (f/d - f/T) / (1 - f/T) of the throughput.
Where throughput is scarce, because first tokens would be late for lack of it, they are chosen only
if the weight of the requests that are in time grows by more; else it is enough that it grows, and
that the throughput does not fall below a limit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tiered_kv.scheduler.cost_model import CostModel
from tiered_kv.scheduler.iteration_config import IterationConfig
from tiered_kv.scheduler.iteration_policy import RunningRequest, decode_tokens

#: A request that is behind its mean pace by so many intervals is given up before others.
HOPELESS_INTERVALS = 20.0


@dataclass(frozen=True, slots=True)
class Pace:
    """How long iterations are to be, and what that is predicted to bring."""

    interval_s: float
    """Longest iteration; infinity: everyone decodes."""
    objective_s: float
    """The token objective that it serves; tighter ones are beyond hope."""
    in_time: float
    """Share, by weight, of the requests whose token objective is met or that have none."""
    throughput: float
    """Tokens per second, as a share of what decoding everyone gives."""
    relegated: frozenset[int] = frozenset()
    """Ids of those who are given up so that others with their objective are in time."""


def find_pace(
    running: Sequence[RunningRequest],
    costs: CostModel,
    config: IterationConfig,
    now_s: float,
    *,
    is_cascade: bool = False,
    prefill_load: float = 0.0,
    is_scarce: bool = True,
) -> Pace:
    """The pace with the most requests in time per second. O(n log n) per distinct objective.

    prefill_load: share of the time that is left to prefill, not to decode. is_scarce: whether
    throughput counts; else the most requests in time, however long they take.
    """
    context, n, saved = decode_tokens(running, is_cascade=is_cascade)
    all_s = costs.iteration_s((), context, n, saved)
    total = sum(request.weight for request in running)
    caution, decode_share = config.caution, 1.0 - prefill_load
    # Between two decodes of everyone there is prefill, too.
    best = Pace(math.inf, all_s, _in_time(running, all_s / (caution * decode_share), total), 1.0)
    objectives = {
        r.tbt_s for r in running if r.tbt_s is not None and caution * r.tbt_s * decode_share < all_s
    }
    if not objectives:
        return best
    fixed_s = costs.iteration_s((), 0, 1)
    for objective_s in sorted(objectives):
        interval_s = caution * objective_s
        decode_s = interval_s * decode_share
        price = throughput_share(fixed_s, decode_s, all_s)
        in_time = _in_time(running, objective_s, total)
        if price <= (0.0 if is_scarce else config.least_throughput):
            continue
        least = best.in_time * best.throughput / price if is_scarce else best.in_time
        if in_time <= least:
            continue
        rotation = Rotation(running, costs, objective_s, config, is_cascade=is_cascade)
        given_up: list[RunningRequest] = []
        if not rotation.fits(decode_s):
            if not config.relegate:
                continue
            given_up = rotation.relegated(decode_s, now_s)
            in_time -= sum(r.weight for r in given_up) / total
            if in_time <= least:
                continue
        ids = frozenset(request.request_id for request in given_up)
        best = Pace(interval_s, objective_s, in_time, price, ids)
    return best


def throughput_share(fixed_s: float, interval_s: float, all_s: float) -> float:
    """Tokens per second with full iterations of `interval_s`, over those with one of `all_s`.

    fixed_s: of an iteration, whoever decodes: its fixed part, and reading the weights.
    """
    if interval_s <= fixed_s or all_s <= fixed_s:
        return 0.0 if interval_s <= fixed_s else 1.0
    return min(1.0, (1.0 - fixed_s / interval_s) / (1.0 - fixed_s / all_s))


def is_in_every_iteration(request: RunningRequest, objective_s: float) -> bool:
    """At the pace that serves `objective_s`."""
    return not request.can_park or (request.tbt_s is not None and request.tbt_s < 2.0 * objective_s)


def max_park_s(request: RunningRequest, config: IterationConfig) -> float:
    """Its bound on the time without a token; else the policy's, or its objective if longer."""
    own = request.max_park_s
    return max(config.max_park_s, request.tbt_s or 0.0) if own is None else own


def _in_time(running: Sequence[RunningRequest], longest_s: float, total: float) -> float:
    """Share by weight of those with no objective or one of at least `longest_s`."""
    late = sum(r.weight for r in running if r.tbt_s is not None and r.tbt_s < longest_s)
    return 1.0 - late / total if total > 0 else 1.0


class Rotation:
    """Who decodes how often at one pace, and the work of a mean iteration."""

    def __init__(
        self,
        running: Sequence[RunningRequest],
        costs: CostModel,
        objective_s: float,
        config: IterationConfig,
        *,
        is_cascade: bool,
    ) -> None:
        self._running = running
        self._costs = costs
        self._is_cascade = is_cascade
        self._interval_s = config.caution * objective_s
        self._config = config
        self._shares: dict[int, float] = {}
        """Of the iterations, those in which each request decodes."""
        context = n = saved = 0.0
        reads: dict[int, tuple[float, int]] = {}
        for request in running:
            share = 1.0
            if not is_in_every_iteration(request, objective_s):
                share = self._rare_share(request)
                if request.tbt_s is not None:
                    share = 1.0 / int(request.tbt_s / objective_s + 1e-6)
            self._shares[request.request_id] = share
            context += share * request.context_tokens
            n += share
            if is_cascade and request.gang is not None:
                saved += share * request.shared_tokens
                often, longest = reads.get(request.gang, (0.0, 0))
                reads[request.gang] = (max(often, share), max(longest, request.shared_tokens))
        # A gang's shared part is read as often as its most frequent member decodes.
        saved -= sum(share * shared for share, shared in reads.values())
        # Whole contexts take turns, so that about half of one does not fit at the end.
        context += self._longest_in_turn(running) / 2.0
        self._work = context, n, saved

    def fits(self, decode_s: float) -> bool:
        """Whether everybody's pace can be kept in decodes of `decode_s`."""
        return self._seconds(self._work) <= decode_s and self._longest_s(self._running) <= decode_s

    def relegated(self, decode_s: float, now_s: float) -> list[RunningRequest]:
        """Who has to be given up so that the others' pace can be kept; it may be everybody.

        Those first who are behind by more than they could make up for, so that nobody is given up
        today and somebody else tomorrow; then those with most work per weight, which leaves out
        the fewest (Moore's rule, as in `slack.py`).
        """
        order = [r for r in self._running if r.can_park and r.tbt_s is not None]
        order.sort(key=lambda r: self._least_first(r, now_s))
        works = [self._work]
        for request in order:
            context, n, saved = works[-1]
            less = self._shares[request.request_id] - self._rare_share(request)
            if self._is_cascade and request.gang is not None:
                saved -= less * request.shared_tokens
            works.append((context - less * request.context_tokens, n - less, saved))
        others = [r for r in self._running if not r.can_park or r.tbt_s is None]
        low, high = 1, len(order)
        while low < high:
            middle = (low + high) // 2
            fits = self._seconds(works[middle]) <= decode_s
            if fits and self._longest_s([*others, *order[middle:]]) <= decode_s:
                high = middle
            else:
                low = middle + 1
        return order[:low]

    def _rare_share(self, request: RunningRequest) -> float:
        """Of the iterations, those that the bound on parking alone asks for."""
        if not request.can_park:
            return 1.0
        return min(1.0, self._interval_s / max_park_s(request, self._config))

    def _seconds(self, work: tuple[float, float, float]) -> float:
        """Of a mean iteration with (context tokens, requests, shared tokens saved)."""
        context, n, saved = work
        return self._costs.iteration_s((), int(context), max(1, round(n)), max(0, int(saved)))

    def _longest_s(self, kept: Sequence[RunningRequest]) -> float:
        """Of an iteration with the longest context among those of `kept` who take turns."""
        always = [r for r in kept if self._shares[r.request_id] == 1.0]
        context, n, saved = decode_tokens(always, is_cascade=self._is_cascade)
        longest = self._longest_in_turn(kept)
        return self._costs.iteration_s((), context + longest, n + bool(longest), saved)

    def _longest_in_turn(self, requests: Iterable[RunningRequest]) -> int:
        """Tokens of the longest context among those that have an objective and take turns."""
        return max(
            (
                r.context_tokens
                for r in requests
                if r.tbt_s is not None and self._shares[r.request_id] < 1.0
            ),
            default=0,
        )

    def _least_first(self, request: RunningRequest, now_s: float) -> tuple[bool, float, int]:
        due_s, tbt_s = request.next_token_due_s, request.tbt_s
        assert tbt_s is not None
        is_behind = due_s is not None and now_s - due_s > HOPELESS_INTERVALS * tbt_s
        work = self._shares[request.request_id] * request.context_tokens
        return not is_behind, -work / max(request.weight, 1e-9), -request.request_id
