"""An adversary that tries to keep requests from being admitted, and the bound it must not break.

From the moment a request is overdue, the work admitted before it is at most

    (work of those older than it + one step's work) / share + one step's work

where a step's work is the most that is admitted between two plans. docs/scheduler.md says why.
"""

from __future__ import annotations

import heapq
import random
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

from support_simulation.builders import BLOCK_TOKENS, cost_model
from tiered_kv.api.slo import Slo
from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.key import namespace_hash
from tiered_kv.scheduler.policies.slack import SlackPolicy
from tiered_kv.scheduler.policies.slack_config import SlackConfig
from tiered_kv.scheduler.request import QueuedRequest
from tiered_kv.scheduler.request_policy import SchedulerState
from tiered_kv.scheduler.slack import price
from tiered_kv.scheduler.waiting import WaitingQueue

#: The adversary sends nothing more while so many wait: a finite queue.
WAITING_MAX = 200
PLAN_LIMIT = 16
#: Blocks of the longest prompt.
BLOCKS_MAX = 400


@dataclass
class Outcome:
    """What happened to all requests."""

    n_admitted: int = 0
    n_overdue: int = 0
    broken: list[str] = field(default_factory=list)
    longest_share: float = 0.0
    """Largest ratio of admitted work to the bound."""


class _OlderWork:
    """Sums of work of waiting requests by id, which is the order of arrival: a Fenwick tree."""

    def __init__(self, n: int) -> None:
        self._sums = [0.0] * (n + 1)

    def add(self, request_id: int, work_s: float) -> None:
        at = request_id + 1
        while at < len(self._sums):
            self._sums[at] += work_s
            at += at & -at

    def before(self, request_id: int) -> float:
        at, total = request_id, 0.0
        while at > 0:
            total += self._sums[at]
            at -= at & -at
        return total


class Adversary:
    """One policy against floods of whatever is more urgent or cheaper than someone who waits."""

    def __init__(self, seed: int, n_requests: int, config: SlackConfig) -> None:
        self._random = random.Random(seed)
        self._n = n_requests
        self._config = config
        self.policy = SlackPolicy(config)
        self._forest = Forest(1, tiers=(Tier.DEVICE, Tier.HOST, Tier.DISK))
        self._root = self._forest.root(namespace_hash("starvation"))
        self._waiting = WaitingQueue(self._forest, tokens_per_unit=BLOCK_TOKENS)
        self._costs = cost_model()
        self._now_s = 0.0
        self._admitted_s = 0.0
        self._step_s_max = 0.0
        self._work: dict[int, float] = {}
        self._older = _OlderWork(n_requests)
        self._ends: list[tuple[float, int]] = []
        self._since: dict[int, tuple[float, float]] = {}
        self._n_sent = 0
        self._own_block = 10**6
        self.outcome = Outcome()

    def run(self, progress: Callable[[int], None] = lambda _: None) -> Outcome:
        """Until every request was admitted; `progress` hears of admissions."""
        while self._n_sent < self._n or len(self._waiting):
            self._send()
            self._note_overdue()
            n_before = self.outcome.n_admitted
            self._step()
            progress(self.outcome.n_admitted - n_before)
        return self.outcome

    def _send(self) -> None:
        """A burst of one kind; what kind changes at random, so floods alternate with lulls."""
        rand = self._random
        if rand.random() < 0.3:
            self._now_s += rand.choice((0.001, 0.1, 2.0))
            return
        kind = rand.randrange(5)
        for _ in range(rand.randrange(1, 12)):
            if self._n_sent >= self._n or len(self._waiting) >= WAITING_MAX:
                return
            self._arrive(kind)

    def _arrive(self, kind: int) -> None:
        rand, request_id = self._random, self._n_sent
        self._n_sent += 1
        n_blocks = rand.choice((1, 2, 8)) if kind in {0, 1} else rand.randrange(1, BLOCKS_MAX)
        shared = [1 + at for at in range(min(n_blocks, 40))] if kind == 3 else []
        self._own_block += 1
        blocks = array("q", [*shared, *([self._own_block] * (n_blocks - len(shared)))])
        slo = (
            Slo("interactive", 0.5, 0.05),
            Slo("batch", 30.0, None),
            Slo("standard", 2.0, 0.1),
            Slo("none"),
            Slo("patient", 1.0, None, max_wait_s=rand.choice((5.0, 50.0))),
        )[kind]
        request = QueuedRequest(
            request_id,
            self._now_s,
            self._root,
            blocks,
            n_blocks * BLOCK_TOKENS + 1,
            64,
            slo=slo,
            queued_s=self._now_s,
        )
        self._waiting.add(request)
        self.policy.on_arrival(request, self._now_s)
        self._work[request_id] = work_s = price(request, self._costs).work_s
        self._older.add(request_id, work_s)
        own_s = slo.max_wait_s
        end_s = self._now_s + (self._config.max_wait_s if own_s is None else own_s)
        heapq.heappush(self._ends, (end_s, request_id))

    def _note_overdue(self) -> None:
        while self._ends and self._ends[0][0] <= self._now_s:
            _, request_id = heapq.heappop(self._ends)
            if request_id in self._work:
                self._since[request_id] = (self._admitted_s, self._older.before(request_id))

    def _step(self) -> None:
        rand = self._random
        order = self.policy.plan(self._state(), PLAN_LIMIT).order
        # Memory is short at times, and then whoever is first and does not fit stops the others.
        room = rand.choice((BLOCKS_MAX, BLOCKS_MAX, 50, 2)) * BLOCK_TOKENS + 1
        n_max = rand.randrange(1, 6)
        step_s = 0.0
        admitted: list[QueuedRequest] = []
        for request_id in order[:n_max]:
            request = self._waiting.get(request_id)
            if request.prompt_tokens > room:
                break
            room -= request.prompt_tokens
            step_s += self._admit(request)
            admitted.append(request)
        self._step_s_max = max(self._step_s_max, step_s)
        self._now_s += step_s if admitted else 0.01
        for request in admitted:
            request.output_tokens = rand.randrange(1, 64)
            self.policy.on_finish(request, self._now_s)

    def _admit(self, request: QueuedRequest) -> float:
        request_id = request.request_id
        self._waiting.remove(request)
        self.policy.on_admission(request, self._now_s)
        work_s = self._work.pop(request_id)
        self._older.add(request_id, -work_s)
        outcome = self.outcome
        outcome.n_admitted += 1
        known = self._since.pop(request_id, None)
        if known is not None:
            outcome.n_overdue += 1
            before_s, older_s = known
            step_s, share = max(self._step_s_max, work_s), self._config.overdue_share
            bound_s = (older_s + step_s) / share + step_s
            passed_s = self._admitted_s - before_s
            outcome.longest_share = max(outcome.longest_share, passed_s / bound_s)
            if passed_s > bound_s + 1e-9:
                outcome.broken.append(
                    f"{request_id}: {passed_s:.3f} s of work before it, bound {bound_s:.3f} s"
                )
        self._admitted_s += work_s
        return work_s

    def _state(self) -> SchedulerState:
        return SchedulerState(
            now_s=self._now_s,
            waiting=self._waiting,
            held={},
            running=(),
            decode_context_tokens=0,
            processed_prefill_tokens=0,
            chunk_tokens=8192,
            costs=self._costs,
        )
