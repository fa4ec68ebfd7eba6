"""All orders of events through the owner of requests' lives, under every policy.

Method: requests come, are admitted by the plan, produce tokens, skip iterations, leave, come back,
are answered and aborted in any order, with aborts in every phase, reports that don't follow, and
reports of requests that nobody has heard of; what is cached of them changes; time passes or not.
Guarantee: nothing raises; a plan names those who wait and may start, each once; when nothing more
comes, everyone who waits is in a plan, and in the end neither owner nor policy knows anybody.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from support_simulation.builders import BLOCK_TOKENS, cost_model
from tiered_kv.api.slo import Slo
from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.key import namespace_hash
from tiered_kv.scheduler.iteration_policy import (
    IterationState,
    RunningRequest,
    iteration_policies,
)
from tiered_kv.scheduler.lifecycle import NEXT, Event, Phase, RequestLives
from tiered_kv.scheduler.plan import AdmissionPlan
from tiered_kv.scheduler.request import QueuedRequest
from tiered_kv.scheduler.request_policy import Arriving, SchedulerState, request_policies
from tiered_kv.scheduler.waiting import WaitingQueue

#: Ids start here, so that they can be told from any other number in a policy's books.
FIRST_ID = 10**9
SLOS = (
    Slo("interactive", 0.5, 0.05),
    Slo("standard", 5.0, 0.2),
    Slo("batch", 60.0),
    Slo("none"),
    Slo("patient", 1.0, None, max_wait_s=3.0),
)
WHO = st.integers(0, 50)
COSTS = cost_model()


class Lives(RuleBasedStateMachine):
    """An engine that reports to the owner; `policy` and `iteration` are what is tested."""

    policy_name = "fcfs"
    iteration_name = "all"

    def __init__(self) -> None:
        super().__init__()
        self.forest = Forest(1, tiers=(Tier.DEVICE, Tier.HOST, Tier.DISK))
        self.root = self.forest.root(namespace_hash("lives"))
        self.policy = request_policies.get(self.policy_name)()
        self.iteration = iteration_policies.get(self.iteration_name)()
        waiting = WaitingQueue(self.forest, tokens_per_unit=BLOCK_TOKENS)
        self.lives = RequestLives(waiting, self.policy)
        self.everyone: list[QueuedRequest] = []
        self.phases: dict[int, Phase] = {}
        self.now_s = 1.0

    # -- what the engine does -----------------------------------------------------------------

    @rule(
        prompt=st.lists(st.integers(1, 2), min_size=1, max_size=6),
        slo=st.sampled_from(SLOS),
        tenant=st.sampled_from(["", "a", "b"]),
        is_held=st.booleans(),
    )
    def arrives(self, prompt: list[int], slo: Slo, tenant: str, is_held: bool) -> None:
        request = self._request(prompt, slo, tenant)
        self.everyone.append(request)
        self._report(Event.QUEUED, request)
        if is_held:
            self.lives.hold(request.request_id, Arriving(self.now_s, 64))

    def _request(self, prompt: list[int], slo: Slo, tenant: str) -> QueuedRequest:
        return QueuedRequest(
            FIRST_ID + len(self.everyone),
            self.now_s,
            self.root,
            array("q", prompt * 4),
            len(prompt) * 4 * BLOCK_TOKENS + 1,
            50,
            slo=slo,
            tenant=tenant,
            queued_s=self.now_s,
        )

    @precondition(lambda self: self.everyone)
    @rule(event=st.sampled_from(Event), who=WHO)
    def is_reported(self, event: Event, who: int) -> None:
        """Whether or not it follows; but nobody comes back who is over."""
        request = self.everyone[who % len(self.everyone)]
        if event is Event.QUEUED and self.phases[request.request_id] is Phase.OVER:
            return
        if event in {Event.TOKEN, Event.ANSWERED}:
            request.output_tokens += 1
        self._report(event, request)

    @precondition(lambda self: self._in(Phase.PREFILLING))
    @rule()
    def all_prompts_are_computed(self) -> None:
        for request in self._in(Phase.PREFILLING):
            request.output_tokens += 1
            self._report(Event.TOKEN, request)

    @precondition(lambda self: self._in(Phase.PREFILLING, Phase.RUNNING))
    @rule(who=WHO)
    def comes_back(self, who: int) -> None:
        """Put back, swapped out or retracted."""
        there = self._in(Phase.PREFILLING, Phase.RUNNING)
        request = there[who % len(there)]
        self._report(Event.LEFT, request)
        self._report(Event.QUEUED, request)

    @rule(admit=st.integers(0, 4), available=st.sampled_from([None, 0, 200, 10_000]))
    def plans(self, admit: int, available: int | None) -> None:
        self._plan(admit, available)

    @rule(seconds=st.sampled_from([0.0, 0.01, 1.0, 400.0]))
    def ticks(self, seconds: float) -> None:
        self.now_s += seconds
        for request in self._in(Phase.LEAVING):
            self.phases[request.request_id] = Phase.OVER
        self.lives.settle(self.now_s)
        self.lives.date(self.now_s)

    @rule(prompt=st.lists(st.integers(1, 2), min_size=1, max_size=6), at=st.booleans())
    def is_cached(self, prompt: list[int], at: bool) -> None:
        tokens, tier = array("q", prompt * 4), Tier.DEVICE if at else Tier.HOST
        result = self.forest.insert(self.root, tokens, range(len(tokens)), tier=tier)
        self.lives.cached_changed(result.adopted, self.now_s)

    @precondition(lambda self: self.lives.held)
    @rule(who=WHO)
    def pages_are_there(self, who: int) -> None:
        held = sorted(self.lives.held)
        self.lives.let_go(held[who % len(held)])

    @precondition(lambda self: self._in(Phase.RUNNING))
    @rule(short=st.sampled_from([0, 0, 100]))
    def iterates(self, short: int) -> None:
        running = [
            RunningRequest(r.request_id, r.prompt_tokens, self.now_s, r.slo.tbt_s)
            for r in self._in(Phase.RUNNING)
        ]
        state = IterationState(self.now_s, running, COSTS, short_tokens=short)
        plan = self.iteration.plan(state)
        ids = {request.request_id for request in running}
        decode = ids if plan.decode is None else set(plan.decode)
        assert decode <= ids
        assert decode or plan.swap_out
        assert not decode.intersection(plan.swap_out) or plan.decode is None
        self.lives.park(ids - decode)

    # -- what nobody has heard of ---------------------------------------------------------------

    @rule(
        hook=st.sampled_from(["on_cached_change", "on_admission", "on_finish", "on_abort"]),
        who=WHO,
    )
    def policy_hears_of_a_stranger(self, hook: str, who: int) -> None:
        """Somebody who never came, or does not wait any more."""
        stranger = self._request([1, 2], SLOS[who % len(SLOS)], "")
        stranger.request_id += 10**6 + who
        getattr(self.policy, hook)(stranger, self.now_s)
        assert stranger.request_id not in set(_numbers(self.policy, set()))

    # -- what holds -----------------------------------------------------------------------------

    @invariant()
    def phases_are_what_was_reported(self) -> None:
        lives, parked = self.lives, Phase.PARKED
        for request_id, phase in self.phases.items():
            found = lives.phase(request_id)
            assert found is phase or (found is parked and phase is Phase.RUNNING)
        waits = {i for i, phase in self.phases.items() if phase is Phase.WAITING}
        assert set(lives.waiting.requests) == waits
        assert lives.held.keys() <= waits
        assert len(lives) == sum(phase is not Phase.OVER for phase in self.phases.values())

    def teardown(self) -> None:
        for request_id in list(self.lives.held):
            self.lives.let_go(request_id)
        for _ in range(60 + 3 * len(self.everyone)):
            if not self.lives.waiting:
                break
            for request in self._in(Phase.PREFILLING, Phase.RUNNING, Phase.LEAVING):
                self._report(Event.LEFT, request)
                self._report(Event.ABORTED, request)
            self.now_s += 1.0
            self._plan(2, None)
        assert not self.lives.waiting, "somebody is in no plan"
        for request in self.everyone:
            self._report(Event.ABORTED, request)
        self.now_s += 1000.0
        self.lives.date(self.now_s)
        self._plan(0, None)
        assert len(self.lives) == 0
        assert not self.lives.wants_time
        known = [each for each in _numbers(self.policy, set()) if each >= FIRST_ID]
        assert not known, "the policy still knows somebody"

    # -- how ------------------------------------------------------------------------------------

    def _report(self, event: Event, request: QueuedRequest) -> None:
        lives, now_s = self.lives, self.now_s
        if event is Event.QUEUED:
            lives.queue(request, now_s)
        elif event is Event.ADMITTED:
            lives.admit(request, now_s)
        elif event is Event.TOKEN:
            lives.token(request)
        elif event is Event.LEFT:
            lives.leave(request)
        elif event is Event.ANSWERED:
            lives.answer(request, now_s)
        else:
            lives.abort(request, now_s)
        before = self.phases.get(request.request_id, Phase.OVER)
        self.phases[request.request_id] = NEXT[event].get(before, before)

    def _in(self, *phases: Phase) -> list[QueuedRequest]:
        return [r for r in self.everyone if self.phases[r.request_id] in phases]

    def _plan(self, admit: int, available: int | None) -> AdmissionPlan:
        begun = self._in(Phase.PREFILLING)
        running = self._in(Phase.RUNNING)
        state = SchedulerState(
            now_s=self.now_s,
            waiting=self.lives.waiting,
            held=self.lives.held,
            running=running,
            decode_context_tokens=sum(r.prompt_tokens + r.output_tokens for r in running),
            processed_prefill_tokens=0,
            chunk_tokens=512,
            costs=COSTS,
            available_tokens=available,
            unfinished=begun[0] if begun else None,
            can_put_back=bool(begun),
        )
        plan = self.policy.plan(state, 16)
        # One who is held may be told to run without the pages that have not come.
        able = {r.request_id for r in state.waiting}
        assert set(plan.order) <= able
        assert len(set(plan.order)) == len(plan.order)
        if plan.put_back_unfinished:
            assert begun
            self._report(Event.LEFT, begun[0])
        for request_id in plan.order[: plan.admit_at_most][:admit]:
            self._report(Event.ADMITTED, self.everyone[request_id - FIRST_ID])
        if plan.put_back_unfinished:
            self._report(Event.QUEUED, begun[0])
        return plan


def _numbers(thing: Any, seen: set[int]) -> Iterator[int]:
    """Every whole number that can be reached from `thing`, and the ids of requests."""
    if isinstance(thing, QueuedRequest):
        yield thing.request_id
        return
    if isinstance(thing, int):
        yield thing
        return
    if id(thing) in seen or isinstance(thing, str | bytes | array | type):
        return
    seen.add(id(thing))
    inside: list[Any] = []
    if isinstance(thing, dict):
        inside = [*thing, *thing.values()]
    elif hasattr(thing, "__iter__"):
        inside = list(thing)
    for owner in type(thing).__mro__:
        names = owner.__dict__.get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            inside.append(getattr(thing, name, None))
    inside += list(getattr(thing, "__dict__", {}).values())
    for each in inside:
        yield from _numbers(each, seen)


#: The iteration policies in turn.
PAIRS = [
    (policy, iteration_policies.names()[at % len(iteration_policies.names())])
    for at, policy in enumerate(request_policies.names())
]


def machine(policy: str, iteration: str) -> type[Lives]:
    return type(f"Lives_{policy}", (Lives,), {"policy_name": policy, "iteration_name": iteration})


@pytest.mark.parametrize(("policy", "iteration"), PAIRS)
def test_all_orders_of_events(policy: str, iteration: str) -> None:
    case = machine(policy, iteration).TestCase
    case.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
    case().runTest()


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("iteration", iteration_policies.names())
@pytest.mark.parametrize("policy", request_policies.names())
def test_all_orders_of_events_for_long(policy: str, iteration: str) -> None:
    case = machine(policy, iteration).TestCase
    case.settings = settings(max_examples=1500, stateful_step_count=80, deadline=None)
    case().runTest()
