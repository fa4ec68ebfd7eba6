"""An adversary that tries to keep requests from being admitted, and the bound it must not break.

From the moment a request is overdue, the work admitted before it is at most

    (work of those older than it + one step's work) / share + one step's work

where a step's work is the most that is admitted between two plans, and those older than it are
those that wait then or come back while it waits. docs/scheduler.md says why.

Besides floods of whatever is more urgent or cheaper, the adversary has prompts that hardly fit into
memory; pages on their way from disk, some of which never come; adapters that cannot be loaded while
others are in use; prompts that were begun and are put back; and requests that are retracted, or
aborted while they wait.
"""

from __future__ import annotations

import heapq
import random
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from support_simulation.builders import BLOCK_TOKENS, cost_model
from tiered_kv.api.slo import Slo
from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.key import namespace_hash
from tiered_kv.scheduler.plan import PLAN_LIMIT, AdmissionPlan
from tiered_kv.scheduler.policies.slack import SlackPolicy
from tiered_kv.scheduler.policies.slack_config import SlackConfig
from tiered_kv.scheduler.request import QueuedRequest
from tiered_kv.scheduler.request_policy import Arriving, SchedulerState
from tiered_kv.scheduler.slack import price
from tiered_kv.scheduler.waiting import WaitingQueue

#: The adversary sends nothing more while so many wait: a finite queue.
WAITING_MAX = 200
#: Blocks of the longest prompt.
BLOCKS_MAX = 400
#: What the device has room for: the longest prompt fits if hardly anybody else runs.
CAPACITY_TOKENS = (BLOCKS_MAX + 20) * BLOCK_TOKENS
#: Adapters whose weights can be in use at once; there are more.
ADAPTERS_MAX = 2
RUNNING_MAX = 50
#: The executor's own patience with pages that do not come: too long to be of any help.
PATIENCE_S = 300.0


@dataclass
class Outcome:
    """What happened to all requests."""

    n_admitted: int = 0
    n_overdue: int = 0
    n_never_came: int = 0
    """Overdue requests that were computed although they waited for pages still."""
    n_passed_over: int = 0
    n_blocked: int = 0
    """Steps in which nobody was admitted, so that an adapter could be loaded."""
    n_did_not_fit: int = 0
    n_put_back: int = 0
    n_retracted: int = 0
    n_aborted: int = 0
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


@dataclass
class _Since:
    """What was so when a request became overdue."""

    admitted_s: float
    older_s: float
    """Work of those older than it, and of such that came back since."""


class Adversary:
    """One policy against all that could keep somebody from being admitted."""

    def __init__(
        self,
        seed: int,
        n_requests: int,
        config: SlackConfig,
        *,
        is_short_of_memory: bool = True,
        passes_anybody: bool = False,
    ) -> None:
        """is_short_of_memory: if not, adapters are what is scarce.

        passes_anybody: go on past who lacks an adapter, whatever the plan says.
        """
        self._capacity = CAPACITY_TOKENS * (1 if is_short_of_memory else 20)
        self._adapter_weights = (4, 3, 3, 0.3, 0.1) if is_short_of_memory else (1, 9, 9, 0.2, 0.1)
        self._decodes_s = (0.0, 0.0, 0.05, 1.0) if is_short_of_memory else (0.05, 1.0, 3.0)
        self._passes_anybody = passes_anybody
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
        self._since: dict[int, _Since] = {}
        self._held: dict[int, Arriving] = {}
        self._never_comes: set[int] = set()
        self._adapters: dict[int, int] = {}
        self._running: dict[int, tuple[float, QueuedRequest]] = {}
        self._unfinished: QueuedRequest | None = None
        self._n_sent = 0
        self._own_block = 10**6
        self.outcome = Outcome()

    def run(self, progress: Callable[[int], None] = lambda _: None) -> Outcome:
        """Until every request was admitted; `progress` hears of admissions."""
        while self._n_sent < self._n or len(self._waiting):
            self._send()
            self._pages_come()
            self._somebody_ends()
            self._note_overdue()
            n_before = self.outcome.n_admitted
            self._step()
            progress(self.outcome.n_admitted - n_before)
        return self.outcome

    # -- what the adversary does --------------------------------------------------------------

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
        if rand.random() < 0.05 and len(self._waiting) > WAITING_MAX // 2:
            self._abort(rand.choice(list(self._waiting.requests.values())))

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
        if rand.random() < 0.3:
            slo = replace(slo, task_s=rand.choice((0.01, 5.0, 500.0)))
        request = QueuedRequest(
            request_id,
            self._now_s,
            self._root,
            blocks,
            n_blocks * BLOCK_TOKENS + 1,
            64,
            slo=slo,
            # Names that many share, names of nobody else, and none.
            program=rand.choice(("", "1", "2", f"own {request_id}")),
            parent_program=rand.choice(("", "1", f"own {request_id - 1}")),
            queued_s=self._now_s,
        )
        # Adapter 0 is none; most want one of those that are in use anyway, few a rare one.
        self._adapters[request_id] = rand.choices(range(5), self._adapter_weights)[0]
        own_s = slo.max_wait_s
        end_s = self._now_s + (self._config.max_wait_s if own_s is None else own_s)
        heapq.heappush(self._ends, (end_s, request_id))
        self._join(request)
        if rand.random() < 0.2:
            ready_s = self._now_s + rand.choice((0.01, 0.3, 3.0))
            tokens = rand.randrange(n_blocks) * BLOCK_TOKENS
            self._held[request_id] = Arriving(ready_s, tokens)
            if rand.random() < 0.3:
                self._never_comes.add(request_id)

    def _join(self, request: QueuedRequest) -> None:
        """It waits, for the first time or again."""
        request_id = request.request_id
        self._waiting.add(request)
        self.policy.on_arrival(request, self._now_s)
        self._work[request_id] = work_s = price(request, self._costs).work_s
        self._older.add(request_id, work_s)

    def _come_back(self, request: QueuedRequest) -> None:
        """It joins with its old arrival, and counts for those overdue who are younger."""
        self._join(request)
        request_id = request.request_id
        for other_id, since in self._since.items():
            if other_id > request_id:
                since.older_s += self._work[request_id]
        heapq.heappush(self._ends, (self._overdue_s(request), request_id))

    def _overdue_s(self, request: QueuedRequest) -> float:
        own_s = request.slo.max_wait_s
        return request.arrival_s + (self._config.max_wait_s if own_s is None else own_s)

    def _leave(self, request: QueuedRequest) -> float:
        """It does not wait any more; returns its work."""
        request_id = request.request_id
        self._waiting.remove(request)
        self._held.pop(request_id, None)
        self._never_comes.discard(request_id)
        work_s = self._work.pop(request_id)
        self._older.add(request_id, -work_s)
        return work_s

    def _abort(self, request: QueuedRequest) -> None:
        self._leave(request)
        self._since.pop(request.request_id, None)
        self.policy.on_abort(request, self._now_s)
        self.outcome.n_aborted += 1

    def _pages_come(self) -> None:
        for request_id, arriving in list(self._held.items()):
            late_s = PATIENCE_S if request_id in self._never_comes else 0.0
            if arriving.ready_s + late_s <= self._now_s:
                del self._held[request_id]

    def _somebody_ends(self) -> None:
        rand = self._random
        for request_id, (end_s, request) in list(self._running.items()):
            if end_s <= self._now_s:
                del self._running[request_id]
                request.output_tokens = rand.randrange(1, 64)
                self.policy.on_finish(request, self._now_s)
        if self._running and rand.random() < 0.01:
            request_id = rand.choice(list(self._running))
            _, request = self._running.pop(request_id)
            request.output_tokens, request.first_token_s = 1, self._now_s
            self.outcome.n_retracted += 1
            self._come_back(request)

    def _note_overdue(self) -> None:
        while self._ends and self._ends[0][0] <= self._now_s:
            _, request_id = heapq.heappop(self._ends)
            if request_id in self._work and request_id not in self._since:
                older_s = self._older.before(request_id)
                self._since[request_id] = _Since(self._admitted_s, older_s)

    # -- what an executor does ----------------------------------------------------------------

    def _step(self) -> None:
        plan = self.policy.plan(self._state(), PLAN_LIMIT)
        if plan.put_back_unfinished:
            request = self._unfinished
            assert request is not None
            self._unfinished = None
            self.outcome.n_put_back += 1
            self._come_back(request)
        admitted = self._admit(plan)
        step_s = sum(work_s for _, work_s in admitted)
        self._step_s_max = max(self._step_s_max, step_s)
        self._now_s += step_s if admitted else 0.01 if self._running else 0.1
        if self._unfinished is not None and self._random.random() < 0.5:
            self._begin(self._unfinished)
            self._unfinished = None
        for request, _ in admitted:
            if self._unfinished is None and request.prompt_tokens > 4096:
                self._unfinished = request
                request.prefilled_tokens = 1024
            else:
                self._begin(request)

    def _begin(self, request: QueuedRequest) -> None:
        """Its prompt is computed, and it decodes for a while."""
        end_s = self._now_s + self._random.choice(self._decodes_s)
        self._running[request.request_id] = end_s, request

    def _admit(self, plan: AdmissionPlan) -> list[tuple[QueuedRequest, float]]:
        """From the front until somebody does not fit, past who lacks an adapter if that may be."""
        rand, outcome = self._random, self.outcome
        running = [request for _, request in self._running.values()]
        if self._unfinished is not None:
            running.append(self._unfinished)
        room = self._capacity - sum(r.prompt_tokens + r.max_new_tokens for r in running)
        in_use = {self._adapters[r.request_id] for r in running} - {0}
        n_max = min(rand.randrange(1, 6), RUNNING_MAX - len(running))
        admitted: list[tuple[QueuedRequest, float]] = []
        order = plan.order[: plan.admit_at_most]
        if not order and not running:
            order = tuple(i for i in self._waiting.requests if i not in self._held)[:1]
        for request_id in order:
            if len(admitted) >= n_max:
                break
            request, adapter = self._waiting.get(request_id), self._adapters[request_id]
            if adapter and adapter not in in_use and len(in_use) >= ADAPTERS_MAX:
                is_in_turn = plan.first_or_none and request_id == order[0] and bool(running)
                if is_in_turn and not self._passes_anybody:
                    outcome.n_blocked += 1
                    break
                outcome.n_passed_over += 1
                continue
            needed = request.prompt_tokens + request.max_new_tokens
            if needed >= room:
                outcome.n_did_not_fit += 1
                break
            room -= needed
            in_use |= {adapter} - {0}
            admitted.append((request, self._start(request)))
        return admitted

    def _start(self, request: QueuedRequest) -> float:
        request_id, outcome = request.request_id, self.outcome
        is_held = request_id in self._held
        work_s = self._leave(request)
        self.policy.on_admission(request, self._now_s)
        outcome.n_admitted += 1
        since = self._since.pop(request_id, None)
        if since is not None:
            outcome.n_overdue += 1
            outcome.n_never_came += is_held
            step_s, share = max(self._step_s_max, work_s), self._config.overdue_share
            bound_s = (since.older_s + step_s) / share + step_s
            passed_s = self._admitted_s - since.admitted_s
            outcome.longest_share = max(outcome.longest_share, passed_s / bound_s)
            if passed_s > bound_s + 1e-9:
                outcome.broken.append(
                    f"{request_id}: {passed_s:.3f} s of work before it, bound {bound_s:.3f} s"
                )
        self._admitted_s += work_s
        return work_s

    def _state(self) -> SchedulerState:
        running = [request for _, request in self._running.values()]
        context_tokens = sum(r.prompt_tokens + r.output_tokens for r in running)
        return SchedulerState(
            now_s=self._now_s,
            waiting=self._waiting,
            held=self._held,
            running=running,
            decode_context_tokens=context_tokens,
            available_tokens=self._capacity - context_tokens,
            processed_prefill_tokens=0,
            chunk_tokens=8192,
            costs=self._costs,
            unfinished=self._unfinished,
            can_put_back=self._unfinished is not None,
        )
