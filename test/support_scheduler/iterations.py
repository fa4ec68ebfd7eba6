"""Running requests without a server: decode iterations as a policy chooses them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from support_simulation.builders import cost_model
from tiered_kv.scheduler.cost_model import CostModel
from tiered_kv.scheduler.iteration_policy import (
    IterationPolicy,
    IterationState,
    RunningRequest,
    decode_tokens,
)

COSTS = cost_model()

Class = tuple[int, int, float | None]
"""(requests, context tokens, token objective in seconds)."""


def running(*classes: Class) -> list[RunningRequest]:
    """Requests of each class, all of which got their last token at 0."""
    found: list[RunningRequest] = []
    for n, context_tokens, tbt_s in classes:
        first = len(found)
        found += [RunningRequest(first + at, context_tokens, 0.0, tbt_s) for at in range(n)]
    return found


def seconds(requests: Iterable[RunningRequest], *, is_cascade: bool = False) -> float:
    context, n, saved = decode_tokens(requests, is_cascade=is_cascade)
    return COSTS.iteration_s((), context, n, saved)


def chosen(
    policy: IterationPolicy, requests: Sequence[RunningRequest], now_s: float, **more: object
) -> list[RunningRequest]:
    plan = policy.plan(IterationState(now_s, requests, COSTS, **more))  # type: ignore[arg-type]
    if plan.decode is None:
        return list(requests)
    assert len(set(plan.decode)) == len(plan.decode)
    by_id = {request.request_id: request for request in requests}
    return [by_id[request_id] for request_id in plan.decode]


@dataclass
class Decoded:
    """What some time of decoding brought."""

    gaps_s: dict[int, list[float]]
    end_s: float

    def n_tokens(self) -> int:
        return sum(len(gaps) for gaps in self.gaps_s.values())

    def worst_s(self, requests: Iterable[RunningRequest]) -> float:
        return max(max(self.gaps_s[r.request_id], default=math.inf) for r in requests)


def decode(
    policy: IterationPolicy, requests: Sequence[RunningRequest], for_s: float, **more: object
) -> Decoded:
    """Iterations one after the other, each as long as predicted; contexts stay as they are."""
    now_s = 0.0
    gaps_s: dict[int, list[float]] = {r.request_id: [] for r in requests}
    is_cascade = bool(more.get("is_cascade", False))
    while now_s < for_s:
        batch = chosen(policy, requests, now_s, **more)
        assert batch
        now_s += seconds(batch, is_cascade=is_cascade)
        for request in batch:
            gaps_s[request.request_id].append(now_s - request.last_token_s)
            request.last_token_s = now_s
    return Decoded(gaps_s, now_s)


@dataclass
class Adversary:
    """Requests of all kinds come and go; passes take what they like; prefill comes between.

    Counts how long anybody went without a token, against the longest pass there was.
    """

    policy: IterationPolicy
    seed: int
    max_park_s: float
    n_running_max: int = 12
    costs: CostModel = COSTS
    broken: list[int] = field(default_factory=list)
    n_parked: int = 0
    worst_share: float = 0.0
    """Longest time without a token, as a share of the bound."""

    def run(self, n_iterations: int) -> None:
        random = np.random.default_rng(self.seed)
        now_s, next_id = 0.0, 0
        requests: list[RunningRequest] = []
        passes_s: list[float] = []
        decoded_last = True
        for _ in range(n_iterations):
            while len(requests) < self.n_running_max and random.random() < 0.4:
                requests.append(self._arrival(next_id, now_s, random))
                next_id += 1
            if not requests:
                continue
            if random.random() < 0.3 and decoded_last:
                # A prefill alone, in its turn.
                passes_s.append(float(random.uniform(0.001, 0.01)))
                now_s += passes_s[-1]
                decoded_last = False
            state = IterationState(
                now_s,
                requests,
                self.costs,
                is_cascade=bool(random.integers(2)),
                prefill_load=float(random.random()),
            )
            plan = self.policy.plan(state)
            ids = {r.request_id for r in requests} if plan.decode is None else set(plan.decode)
            assert ids, "nobody decodes although somebody could"
            assert ids <= {r.request_id for r in requests}
            batch = [r for r in requests if r.request_id in ids]
            assert all(r.request_id in ids for r in requests if not r.can_park)
            self.n_parked += len(requests) - len(batch)
            passes_s.append(seconds(batch) * float(random.lognormal(0.0, 0.1)))
            now_s += passes_s[-1]
            decoded_last = True
            # A pass that was under way, a prefill in its turn, the pass with it.
            three_s = 3.0 * max(passes_s[-200:])
            for request in requests:
                waited_s = now_s - request.last_token_s
                bound_s = max(self.max_park_s, request.tbt_s or 0.0) + three_s
                self.worst_share = max(self.worst_share, waited_s / bound_s)
                if waited_s > bound_s:
                    self.broken.append(request.request_id)
            for request in batch:
                request.last_token_s = now_s
                request.context_tokens += 1
            requests = [r for r in requests if r.request_id not in ids or random.random() > 0.02]

    def _arrival(
        self, request_id: int, now_s: float, random: np.random.Generator
    ) -> RunningRequest:
        tbt_s = (0.02, 0.025, 0.05, 0.2, 0.7, None)[int(random.integers(6))]
        context = int(2.0 ** random.uniform(8, 13))
        if (tbt_s is None or tbt_s > 0.5) and random.random() < 0.5:
            # One that never fits beside those with objectives.
            context = 400_000
        gang = int(random.integers(4)) if random.random() < 0.5 else None
        return RunningRequest(
            request_id,
            context,
            now_s,
            tbt_s,
            next_token_due_s=None if tbt_s is None else now_s + float(random.normal(0.0, 1.0)),
            gang=gang,
            shared_tokens=0 if gang is None else min(context, 256 << gang),
            can_park=bool(random.random() > 0.03),
            weight=float(random.choice((0.0, 0.5, 1.0, 10.0))),
        )
