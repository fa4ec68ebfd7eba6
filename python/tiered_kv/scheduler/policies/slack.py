"""This project's order: gangs by deadline slack, with aging, inside a memory forecast.

1. Whoever is overdue, in the order of arrival, if it is their turn (`aging.py`).
2. Those who can be in time, by deadline (`slack.py`): as many as possible, not as they come.
3. The overdue, if it was not their turn.
4. Everyone else, by aged work: requests beyond hope of their deadline, and those without one. They
   are relegated, not dropped (Niyama, arXiv 2503.22562). Calls of one program count from its first
   (`tasks.py`).

Behind a request come those of its gang that its prefix, on the device now, makes cheap; and who
would compute what another member is computing is kept back until that is done (`slack_order.py`).
The iteration is filled as far as the running requests' token deadlines and the first one's deadline
leave time (`prefill_room.py`).

Whose pages are on their way from disk waits for them, unless they are expected too late for its
deadline, or it is overdue: then it is computed.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice

from tiered_kv.memory.demand import DemandForecast, Expectation
from tiered_kv.memory.read_order import Urgency
from tiered_kv.scheduler.aging import Overdue, aged_key
from tiered_kv.scheduler.everyone_decodes import EveryoneDecodes
from tiered_kv.scheduler.forming import Forming
from tiered_kv.scheduler.gang import Gangs
from tiered_kv.scheduler.memory_forecast import MemoryForecast
from tiered_kv.scheduler.ordered import OrderedIds
from tiered_kv.scheduler.plan import PLAN_LIMIT, AdmissionPlan
from tiered_kv.scheduler.policies.slack_config import SlackConfig
from tiered_kv.scheduler.policies.slack_order import Entry, GangOrder, Queue
from tiered_kv.scheduler.request import QueuedRequest
from tiered_kv.scheduler.request_policy import SchedulerState
from tiered_kv.scheduler.slack import (
    Job,
    Price,
    Selection,
    price,
    queued_load_s,
    select_beside,
    select_in_time,
    token_due_s,
)
from tiered_kv.scheduler.tasks import Tasks
from tiered_kv.scheduler.tenants import TenantShares

#: Deadlines looked at to decide who can be in time; later ones follow by deadline.
HORIZON = 64
#: Requests whose prefixes are forecast.
FORECAST_LENGTH = 32
#: Requests that are priced for one plan: those who decode don't wait for a burst to be priced.
PRICED_AT_ONCE = 2048
#: Of who was admitted before it was priced.
_NOTHING = Price(0.0, 0.0, 0.0)


class SlackPolicy:
    """Work per plan: what changed since the last one, and O(log n) for each request it returns."""

    def __init__(self, config: SlackConfig | None = None) -> None:
        self._config = config = config or SlackConfig()
        self._entries: dict[int, Entry] = {}
        self._changed: dict[int, QueuedRequest] = {}
        self._by_deadline = OrderedIds()
        """Those who could be in time if they ran at once."""
        self._by_start = OrderedIds()
        """The same by latest start."""
        self._others = TenantShares()
        self._tasks = Tasks(working_set=config.working_set and config.slack and config.aging)
        self._overdue = Overdue(config.overdue_share)
        self._in_turn: deque[int] = deque()
        """The overdue that could start at the last plan, by arrival."""
        self._is_their_turn = True
        self._protected: set[int] = set()
        """Those admitted in their turn: their prompts are put back for nobody."""
        self._gangs = Gangs()
        self._forming = Forming()
        self._memory = MemoryForecast(config.length_quantile, config.memory_margin)
        self._slowdown = 1.0
        self._now_s = 0.0
        self._waits_on: dict[int, bool] = {}
        """What the plan under way has decided on those who are held."""
        self._head: tuple[int, ...] = ()

    # -- what happens -------------------------------------------------------------------------

    def on_arrival(self, request: QueuedRequest, now_s: float) -> None:
        """It is priced at the next plan, which knows the costs."""
        self._changed[request.request_id] = request
        self._tasks.arrived(request, now_s)
        if self._config.gangs:
            self._gangs.add(request)
            self._forming.arrived(request, now_s)
        if self._config.aging:
            self._overdue.add(request.request_id, request.arrival_s, self._max_wait_s(request))

    def on_cached_change(self, request: QueuedRequest, now_s: float) -> None:  # noqa: ARG002
        """Its price changed."""
        if self._waits(request.request_id):
            self._changed[request.request_id] = request

    def on_admission(self, request: QueuedRequest, now_s: float) -> None:
        """It leaves all orders; others may wait for what it computes."""
        request_id = request.request_id
        if not self._waits(request_id):
            return
        entry = self._entries.get(request_id)
        spent = entry.price if entry is not None else _NOTHING
        in_turn = False
        if self._in_turn and self._in_turn[0] == request_id:
            self._in_turn.popleft()
            in_turn = self._is_their_turn
        self._leave(request_id)
        self._tasks.admitted(request, now_s)
        if in_turn:
            self._protected.add(request_id)
        if self._config.aging:
            self._overdue.admitted(spent.work_s, in_turn=in_turn, now_s=now_s)
        self._others.charge(request.tenant, spent.work_s)
        if self._config.gangs:
            self._gangs.lead(request, now_s + spent.takes_s(self._slowdown))

    def on_finish(self, request: QueuedRequest, now_s: float) -> None:
        """One more length of an answer is known."""
        self._tasks.ended(request, now_s)
        self._gangs.stop(request.request_id)
        self._protected.discard(request.request_id)
        self._memory.finished(request)

    def on_abort(self, request: QueuedRequest, now_s: float) -> None:
        """Whoever waited for what it computed is free."""
        self._tasks.ended(request, now_s)
        self._leave(request.request_id)
        self._memory.forget(request.request_id)

    def _waits(self, request_id: int) -> bool:
        return request_id in self._entries or request_id in self._changed

    def _leave(self, request_id: int) -> None:
        self._entries.pop(request_id, None)
        self._changed.pop(request_id, None)
        self._by_deadline.discard(request_id)
        self._by_start.discard(request_id)
        self._others.discard(request_id)
        self._overdue.remove(request_id)
        self._protected.discard(request_id)
        self._gangs.remove(request_id)
        self._forming.left(request_id)

    # -- the plan -----------------------------------------------------------------------------

    def plan(self, state: SchedulerState, limit: int) -> AdmissionPlan:
        """See `RequestPolicy.plan`."""
        self._now_s = state.now_s
        self._waits_on.clear()
        self._forming.expire(state.now_s)
        self._take_in(state)
        self._tasks.plan(state)
        everyone = EveryoneDecodes(state, self._config)
        self._slowdown = everyone.slowdown
        unfinished = state.unfinished
        jobs = self._jobs(state)
        selection, is_put_back = self._select(state, jobs, unfinished)
        if unfinished is not None and self._gangs.is_leading(unfinished.request_id):
            until_s = state.now_s + self._seconds_left(state, unfinished)
            self._gangs.extend(unfinished.request_id, until_s)
        self._gangs.expire(state.now_s)
        self._in_turn = deque(islice(self._overdue.by_arrival(state.now_s), limit))
        self._is_their_turn = self._overdue.is_their_turn()
        head = tuple(islice(self._order(state, jobs, selection), limit))
        self._head = head[:FORECAST_LENGTH]
        goes_on = unfinished is not None and not is_put_back
        first = [self._entries[request_id].request for request_id in head]
        ahead = everyone.ahead(first, goes_on=goes_on)
        due_s = self._due_in_s(state, head)
        room, first_in_time = everyone.room(first, ahead, due_s, goes_on=goes_on)
        return AdmissionPlan(
            head,
            prefill_tokens=first_in_time,
            room=room,
            ahead=ahead,
            mix_decodes=everyone.is_mixed,
            admit_at_most=self._admit_at_most(state, first),
            first_or_none=self._is_their_turn and bool(self._in_turn),
            put_back_unfinished=is_put_back,
            waits_for_gangs=bool(self._forming) or self._gangs.has_leaders,
        )

    def forecast(self, state: SchedulerState) -> DemandForecast:  # noqa: ARG002
        """The head of the last plan, each after those before it."""
        expected: dict[int, Expectation] = {}
        if not self._config.forecast:
            return DemandForecast(expected)
        starts_in_s = 0.0
        for request_id in self._head:
            entry = self._entries.get(request_id)
            if entry is None:
                continue
            path = entry.request.path
            if path:
                expected.setdefault(path[-1].node_id, Expectation(starts_in_s))
            starts_in_s += entry.price.takes_s(self._slowdown)
        return DemandForecast(expected)

    def urgency(self, request: QueuedRequest) -> Urgency:
        """By deadline as long as there is one to be met; then as the rest are admitted."""
        due_s = token_due_s(request)
        if self._config.slack and self._now_s <= due_s < math.inf:
            return 0.0, due_s
        entry = self._entries.get(request.request_id)
        return 1.0, request.arrival_s if entry is None else self._aged_key(entry)

    # -- who is how late (`UrgentFirst`) ------------------------------------------------------

    def tightest(self, limit: int) -> list[tuple[QueuedRequest, float]]:
        """Of those who were priced by the last plan."""
        return self._starts(islice(self._by_start, limit))

    def not_in_time(self, limit: int) -> list[tuple[QueuedRequest, float]]:
        """Of those who were priced by the last plan."""
        return self._starts(islice(self._others.merged({}, {}), limit))

    def n_in_time(self) -> int:
        return len(self._by_start)

    def _starts(self, request_ids: Iterable[int]) -> list[tuple[QueuedRequest, float]]:
        entries = (self._entries[request_id] for request_id in request_ids)
        return [(entry.request, entry.deadline_s - entry.price.work_s) for entry in entries]

    # -- keeping the orders -------------------------------------------------------------------

    def _take_in(self, state: SchedulerState) -> None:
        """Price what changed, and relegate those whose latest start has passed."""
        now_s = state.now_s
        for request_id in self._next_changed(now_s):
            request = self._changed.pop(request_id)
            priced, due_s = price(request, state.costs), token_due_s(request)
            inherited_s = self._inherited_s(request)
            if inherited_s - priced.work_s >= now_s:
                due_s = min(due_s, inherited_s)
            entry = self._entries[request_id] = Entry(request, priced, due_s)
            self._put(request_id, entry, now_s)
        if self._by_start.first_key() < now_s:
            for request_id in self._by_start.below(now_s):
                entry = self._entries[request_id]
                # Its program's deadline may be lost, and its own not.
                entry.deadline_s = token_due_s(entry.request)
                self._put(request_id, entry, now_s)

    def _next_changed(self, now_s: float) -> list[int]:
        """The first to change, and before them the overdue whose turn it may be."""
        changed, overdue = self._changed, islice(self._overdue.by_arrival(now_s), PLAN_LIMIT)
        first = [request_id for request_id in overdue if request_id in changed]
        return list(dict.fromkeys((*first, *islice(changed, PRICED_AT_ONCE))))

    def _inherited_s(self, request: QueuedRequest) -> float:
        """When its first token is due for its program's sake; infinity if it does not matter."""
        if request.output_tokens:
            return math.inf
        return max(self._tasks.due_s(request), request.arrival_s + self._config.least_ttft_s)

    def _put(self, request_id: int, entry: Entry, now_s: float) -> None:
        latest_start_s = entry.deadline_s - entry.price.work_s
        if self._config.slack and math.isfinite(latest_start_s) and latest_start_s >= now_s:
            self._others.discard(request_id)
            self._by_deadline.put(request_id, entry.deadline_s)
            self._by_start.put(request_id, latest_start_s)
            return
        self._by_deadline.discard(request_id)
        self._by_start.discard(request_id)
        self._others.put(entry.request.tenant, request_id, self._aged_key(entry))

    def _aged_key(self, entry: Entry) -> float:
        config, request, work_s = self._config, entry.request, entry.price.work_s
        if not config.slack:
            return request.arrival_s
        if not config.aging:
            return work_s
        since_s = request.arrival_s
        if config.programs:
            since_s = max(self._tasks.started_s(request), since_s - config.program_lead_s)
        return aged_key(since_s, work_s, config.patience)

    # -- who is in time -----------------------------------------------------------------------

    def _jobs(self, state: SchedulerState) -> list[Job]:
        """The next deadlines that could be met, soonest first."""
        entries, shares = self._entries, self._others
        queued_s = queued_load_s(state)
        ids = (rid for rid in self._by_deadline if not self._is_to_wait(state, rid))
        return [
            Job(
                rid,
                entry.price.takes_s(self._slowdown, queued_s),
                entry.deadline_s,
                shares.weight(entry.request.tenant),
            )
            for rid in islice(ids, HORIZON)
            for entry in (entries[rid],)
        ]

    def _is_to_wait(self, state: SchedulerState, request_id: int) -> bool:
        """Whether it waits for the rest of its gang, or for its pages, as it does better to."""
        if request_id in self._forming:
            return True
        arriving = state.held.get(request_id)
        if arriving is None:
            return False
        if request_id not in self._by_deadline:
            return True  # computing it would be too late as well
        waits_on = self._waits_on.get(request_id)
        if waits_on is None:
            entry, now_s, slowdown = self._entries[request_id], state.now_s, self._slowdown
            latest_start_s = entry.deadline_s - entry.price.takes_s(slowdown)
            with_pages = price(entry.request, state.costs, arriving.tokens)
            needed_s = entry.deadline_s - with_pages.takes_s(slowdown)
            is_in_time = arriving.is_in_time(now_s, needed_s, latest_start_s)
            waits_on = self._waits_on[request_id] = latest_start_s < now_s or is_in_time
        return waits_on

    def _select(
        self, state: SchedulerState, jobs: list[Job], unfinished: QueuedRequest | None
    ) -> tuple[Selection, bool]:
        """Who can be in time, and whether the prompt that was begun is put back for them."""
        now_s = state.now_s
        if unfinished is None:
            return select_in_time(jobs, now_s), False
        request_id = unfinished.request_id
        weight = self._others.weight(unfinished.tenant)
        own = Job(
            request_id, self._seconds_left(state, unfinished), token_due_s(unfinished), weight
        )
        may_put_back = state.can_put_back and self._config.put_back
        may_put_back = may_put_back and request_id not in self._protected
        beside, is_put_back = select_beside(jobs, own, now_s, may_put_back=may_put_back)
        if is_put_back and not self._fits(state, beside.in_time[0].request_id):
            # Its own memory comes back only when it is in the queue: both would stand still.
            return select_beside(jobs, own, now_s, may_put_back=False)
        return beside, is_put_back

    def _fits(self, state: SchedulerState, request_id: int) -> bool:
        """Whether the device has room for its prompt now, as far as is known."""
        available = state.available_tokens
        return available is None or self._entries[request_id].request.uncached_tokens < available

    def _seconds_left(self, state: SchedulerState, request: QueuedRequest) -> float:
        """Until the first token of one whose prompt was begun, if it goes on."""
        tokens, cached = request.unprefilled_tokens, request.prefilled_tokens
        return state.costs.marginal_prefill_s(tokens, cached) * self._slowdown

    def _max_wait_s(self, request: QueuedRequest) -> float:
        max_wait_s = request.slo.max_wait_s
        return self._config.max_wait_s if max_wait_s is None else max_wait_s

    # -- the order ----------------------------------------------------------------------------

    def _order(self, state: SchedulerState, jobs: list[Job], selection: Selection) -> Iterator[int]:
        """Ids, the first to be admitted first, gangs together."""
        waits = partial(self._is_to_wait, state)
        queue = Queue(self._entries, self._gangs, self._memory.lengths, self._slowdown, waits)
        order = GangOrder(queue, state, self._config, self._spare_s(selection, state.now_s))
        overdue = list(self._in_turn)
        if self._is_their_turn:
            yield from order.alone(overdue)
        yield from order.with_gangs(job.request_id for job in selection.in_time)
        yield from order.alone(overdue)
        order.spare_s = math.inf
        left_out = {job.request_id for job in selection.left_out}
        decided = left_out | {job.request_id for job in jobs}
        yield from order.with_gangs(rid for rid in self._by_deadline if rid not in decided)
        behind = {rid: self._aged_key(self._entries[rid]) for rid in left_out}
        tenants = {rid: self._entries[rid].request.tenant for rid in left_out}
        # Relegated, or never in a hurry.
        others = self._others.merged(behind, tenants)
        yield from order.with_gangs(self._tasks.unpaused(others, self._entries, self._aged_key))

    def _spare_s(self, selection: Selection, now_s: float) -> float:
        """How much can be put in front of those in time without making one of them late."""
        spare_s, end_s = math.inf, now_s
        for job in selection.in_time:
            end_s += job.work_s
            spare_s = min(spare_s, job.deadline_s - end_s)
        return max(0.0, spare_s)

    # -- how much of it -----------------------------------------------------------------------

    def _due_in_s(self, state: SchedulerState, head: tuple[int, ...]) -> float:
        """Seconds until the first token of the first one is due; infinity if it will be late."""
        if not head or head[0] not in self._by_deadline:
            return math.inf
        return self._entries[head[0]].deadline_s - state.now_s

    def _admit_at_most(self, state: SchedulerState, first: list[QueuedRequest]) -> int | None:
        return self._memory.admit_at_most(state, first) if self._config.forecast else None
