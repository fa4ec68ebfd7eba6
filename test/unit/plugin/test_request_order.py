"""A policy over SGLang's queue: real requests of SGLang's, real tiers, a scheduler in miniature.

Guarantee: for one call the queue is what the plan offers, afterwards it is whole, in the order of
arrival; the policy hears of everything that happens to a request, at the time of the clock's tick.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH, Req
from sglang.srt.sampling.sampling_params import SamplingParams

from support_tiers.tier_rig import PAGE_SIZE, Rig, new_disk, tokens_of
from tiered_kv.api.slo import Slo
from tiered_kv.api.terms import Terms
from tiered_kv.core.device_spec import find_device
from tiered_kv.core.model_spec import find_model
from tiered_kv.forest.node import Tokens
from tiered_kv.memory.demand import DemandForecast, Expectation
from tiered_kv.plugin import scheduler_hooks
from tiered_kv.plugin.clock_tick import Tick
from tiered_kv.plugin.metrics_adapter import MetricsRecorder
from tiered_kv.plugin.request_order import PLAN_LIMIT, RequestOrder
from tiered_kv.plugin.residency_log import ResidencyLog
from tiered_kv.scheduler.cost_model import CostModel
from tiered_kv.scheduler.plan import AdmissionPlan
from tiered_kv.scheduler.request import QueuedRequest
from tiered_kv.scheduler.request_policy import SchedulerState

CHUNK = 8 * PAGE_SIZE


class Spy:
    """Plans what the test says, by default the order of arrival; remembers what it is told."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, int, float]] = []
        self.changes: list[int] = []
        self.states: list[SchedulerState] = []
        self.limits: list[int] = []
        self.plan_fields: dict[str, Any] = {}
        self.order: list[int] | None = None

    def on_arrival(self, request: QueuedRequest, now_s: float) -> None:
        self.heard.append(("arrival", request.request_id, now_s))

    def on_admission(self, request: QueuedRequest, now_s: float) -> None:
        self.heard.append(("admission", request.request_id, now_s))

    def on_finish(self, request: QueuedRequest, now_s: float) -> None:
        self.heard.append(("finish", request.request_id, now_s))

    def on_abort(self, request: QueuedRequest, now_s: float) -> None:
        self.heard.append(("abort", request.request_id, now_s))

    def on_cached_change(self, request: QueuedRequest, now_s: float) -> None:
        self.changes.append(request.request_id)

    def plan(self, state: SchedulerState, limit: int) -> AdmissionPlan:
        self.states.append(state)
        self.limits.append(limit)
        order = self.order
        if order is None:
            order = [request.request_id for request in state.candidates()]
        return AdmissionPlan(tuple(order[:limit]), **self.plan_fields)


class MiniScheduler:
    """The attributes and the steps of SGLang's scheduler that matter here."""

    def __init__(self, rig: Rig, policy: Any) -> None:
        self.waiting_queue: list[Req] = []
        self.chunked_req: Req | None = None
        self.chunked_prefill_size: int | None = CHUNK
        self.max_prefill_tokens = 16384
        self.page_size = PAGE_SIZE
        self.is_mixed_chunk = False
        self.tree_cache = SimpleNamespace(evictable_size=lambda: 0)
        self.has_decode_memory = True
        self.running_batch = SimpleNamespace(
            reqs=[], batch_is_full=False, check_decode_mem=lambda: self.has_decode_memory
        )
        self.offered: list[str] | None = None
        self.chunk_seen: int | None = None
        self.mix_seen: bool | None = None
        self.mixed: bool | None = None
        self.admit = 1
        residency = ResidencyLog(rig.events)
        rig.context.listener = residency
        costs = CostModel(find_model("Llama-3.1-8B"), find_device("H200-141"), {})
        self.tiered_kv_order = RequestOrder(
            self, policy, rig.hierarchy, costs, residency, MetricsRecorder()
        )
        self._rig = rig
        self.policy = SimpleNamespace(tiered_kv_order=self.tiered_kv_order)

    def tick(self, now_s: float) -> None:
        self.tiered_kv_order.clock.take(Tick(now_s))

    def arrive(self, req: Req) -> None:
        self.waiting_queue.append(req)
        scheduler_hooks.note_arrival(None, self, req)

    def step(self) -> list[str]:
        """A pass of `_get_new_batch_prefill_raw`; returns who was admitted."""
        batch, _ = scheduler_hooks.form_prefill(
            MiniScheduler._raw, self, running_batch=self.running_batch
        )
        return [] if batch is None else [req.rid for req in batch.reqs]

    def _raw(self, running_batch: Any) -> tuple[Any, Any]:
        self.offered = None
        self._rig.hierarchy.poll()
        self.tiered_kv_order.after_poll()
        if running_batch.batch_is_full or not self.waiting_queue:
            return None, running_batch
        scheduler_hooks.put_in_order(
            lambda *_: pytest.fail("SGLang's own order"),
            self.policy,
            self.waiting_queue,
            running_batch,
        )
        self.offered = [req.rid for req in self.waiting_queue]
        self.chunk_seen, self.mix_seen = self.chunked_prefill_size, self.is_mixed_chunk
        admitted = self.waiting_queue[: self.admit]
        if not admitted:
            return None, running_batch
        self.waiting_queue = [req for req in self.waiting_queue if req not in admitted]
        scheduler_hooks.before_mixing(
            None, SimpleNamespace(tree_cache=SimpleNamespace(request_order=self.tiered_kv_order))
        )
        self.mixed = self.is_mixed_chunk
        running_batch.reqs += admitted
        batch = SimpleNamespace(
            reqs=admitted,
            extend_num_tokens=sum(len(req.origin_input_ids) for req in admitted),
            prefill_stats=None,
        )
        return batch, running_batch

    @property
    def waiting(self) -> list[str]:
        return [req.rid for req in self.waiting_queue]


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig(disk=new_disk())
    yield rig
    rig.hierarchy.close(1.0)


@pytest.fixture
def spy() -> Spy:
    return Spy()


@pytest.fixture
def scheduler(rig: Rig, spy: Spy) -> MiniScheduler:
    scheduler = MiniScheduler(rig, spy)
    scheduler.tick(100.0)
    return scheduler


def request(rid: str, tokens: Tokens | None = None, **fields: Any) -> Req:
    tokens = tokens_of(abs(hash(rid)) % 1000 + 1, 2) if tokens is None else tokens
    return Req(rid, "", tokens, SamplingParams(max_new_tokens=8), **fields)


def three(scheduler: MiniScheduler) -> list[Req]:
    reqs = [request(rid) for rid in "abc"]
    for req in reqs:
        scheduler.arrive(req)
    return reqs


# -- the queue ---------------------------------------------------------------------------------


def test_the_plan_is_offered_and_the_queue_is_whole_afterwards(
    scheduler: MiniScheduler, spy: Spy
) -> None:
    three(scheduler)
    spy.order = [3, 1]
    assert scheduler.step() == ["c"]
    assert scheduler.offered == ["c", "a"]
    assert scheduler.waiting == ["a", "b"]
    assert spy.heard[3:] == [("admission", 3, 100.0)]


def test_where_nobody_fits_everybody_still_waits(scheduler: MiniScheduler, spy: Spy) -> None:
    three(scheduler)
    spy.order, scheduler.admit = [2], 0
    assert scheduler.step() == []
    assert scheduler.offered == ["b"]
    assert scheduler.waiting == ["a", "b", "c"]


def test_no_more_are_offered_than_the_plan_admits(scheduler: MiniScheduler, spy: Spy) -> None:
    three(scheduler)
    spy.plan_fields = {"admit_at_most": 2}
    scheduler.step()
    assert scheduler.offered == ["a", "b"]


def test_a_policy_that_offers_nobody_cannot_hang_an_idle_server(
    scheduler: MiniScheduler, spy: Spy
) -> None:
    three(scheduler)
    spy.order = []
    assert scheduler.step() == ["a"]
    # Somebody runs now: the policy may have its reasons.
    assert scheduler.step() == []
    assert scheduler.waiting == ["b", "c"]


def test_as_many_are_asked_for_as_one_batch_can_take(scheduler: MiniScheduler, spy: Spy) -> None:
    for i in range(5 * PLAN_LIMIT):
        scheduler.arrive(request(f"{i}", array("q", [i + 10])))
    # One token each, so a chunk of 32 takes 32 of them.
    scheduler.step()
    assert spy.limits == [PLAN_LIMIT, 2 * PLAN_LIMIT]
    assert scheduler.offered == [f"{i}" for i in range(CHUNK)]


def test_nobody_waits_nothing_is_asked(scheduler: MiniScheduler, spy: Spy, rig: Rig) -> None:
    assert scheduler.step() == []
    rig.serve(tokens_of(1, 2))
    scheduler.step()
    assert spy.states == []
    assert not scheduler.tiered_kv_order.queue.wants_time


# -- what a policy sees ------------------------------------------------------------------------


def test_a_request_as_the_policy_sees_it(scheduler: MiniScheduler, spy: Spy, rig: Rig) -> None:
    rig.serve(tokens_of(1, 2, 3))
    req = request("a", tokens_of(1, 2, 9, 8, tail=1), priority=4)
    req.tiered_kv_terms = Terms(slo=Slo("interactive", 0.5, 0.05), tenant="t")
    scheduler.arrive(req)
    scheduler.step()
    seen = spy.states[0].waiting  # emptied by the admission
    assert len(seen) == 0
    queued: QueuedRequest = req.tiered_kv_queued
    assert (queued.prompt_tokens, queued.max_new_tokens, queued.priority) == (17, 8, 4)
    assert (queued.slo.ttft_s, queued.tenant, queued.arrival_s) == (0.5, "t", 100.0)
    assert queued.device_tokens == 2 * PAGE_SIZE


def test_what_becomes_cached_while_it_waits_is_seen(
    scheduler: MiniScheduler, spy: Spy, rig: Rig
) -> None:
    req, other = request("a", tokens_of(1, 2, 3)), request("b", tokens_of(7, 8))
    scheduler.arrive(req)
    scheduler.arrive(other)
    rig.serve(tokens_of(1, 2))
    spy.order = []
    scheduler.running_batch.reqs.append(running(scheduler, "r"))
    scheduler.step()
    assert spy.changes == [req.tiered_kv_queued.request_id]
    assert req.tiered_kv_queued.device_tokens == 2 * PAGE_SIZE

    rig.drain()
    rig.drop_from_device()
    scheduler.step()
    assert (req.tiered_kv_queued.device_tokens, req.tiered_kv_queued.host_tokens) == (0, 8)
    assert other.tiered_kv_queued.cached_tokens == 0


def running(scheduler: MiniScheduler, rid: str) -> Req:
    """A request that was admitted and has two tokens."""
    req = request(rid)
    scheduler.arrive(req)
    order = scheduler.tiered_kv_order
    scheduler.waiting_queue.remove(req)
    order.queue.admitted([req], order.clock.now_s)
    req.output_ids = array("q", [5, 6])
    return req


def test_the_running_requests_are_up_to_date(scheduler: MiniScheduler, spy: Spy) -> None:
    req = running(scheduler, "r")
    scheduler.running_batch.reqs.append(req)
    scheduler.arrive(request("a"))
    req.output_ids.append(7)
    scheduler.step()
    (state,) = spy.states
    (queued,) = state.running
    assert (queued.output_tokens, state.decode_context_tokens) == (3, len(req.origin_input_ids) + 3)


def test_nothing_is_looked_up_again_if_nothing_changed(
    scheduler: MiniScheduler, spy: Spy, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    three(scheduler)
    spy.order = []
    scheduler.running_batch.reqs.append(running(scheduler, "r"))
    scheduler.step()
    monkeypatch.setattr(rig.forest, "match", lambda *_: pytest.fail("looked up"))
    for _ in range(10):
        scheduler.step()
    assert len(spy.states) == 11


# -- what a policy hears -----------------------------------------------------------------------


def test_who_is_aborted_while_waiting(scheduler: MiniScheduler, spy: Spy) -> None:
    three(scheduler)
    del scheduler.waiting_queue[1]
    scheduler.tick(101.0)
    scheduler.step()
    assert scheduler.offered == ["a", "c"]
    assert ("abort", 2, 101.0) in spy.heard
    assert ("admission", 2, 101.0) not in spy.heard


def test_who_finishes_is_heard_of_with_the_next_tick(scheduler: MiniScheduler, spy: Spy) -> None:
    req = running(scheduler, "r")
    queue = scheduler.tiered_kv_order.queue
    queue.first_token(req)
    scheduler.tick(102.0)
    assert req.tiered_kv_queued.first_token_s == 102.0
    req.finished_reason = FINISH_LENGTH(2)
    queue.ended(req)
    assert queue.wants_time
    assert spy.heard[-1][0] == "admission"
    scheduler.tick(103.0)
    assert spy.heard[-1] == ("finish", 1, 103.0)
    queued = req.tiered_kv_queued
    assert (queued.first_token_s, queued.last_token_s, queued.output_tokens) == (102.0, 103.0, 2)
    assert not queue.wants_time


@pytest.mark.parametrize("field", ["finished_reason", "to_finish"])
def test_who_is_aborted_while_running(scheduler: MiniScheduler, spy: Spy, field: str) -> None:
    req = running(scheduler, "r")
    setattr(req, field, FINISH_ABORT())
    scheduler.tiered_kv_order.queue.ended(req)
    scheduler.tick(103.0)
    assert spy.heard[-1] == ("abort", 1, 103.0)


def test_who_is_retracted_waits_again(scheduler: MiniScheduler, spy: Spy, rig: Rig) -> None:
    req = running(scheduler, "r")
    scheduler.tiered_kv_order.queue.ended(req)  # gives up its KV, but is not finished
    rig.serve(req.origin_input_ids + array("q", [5, 6, 0, 0]))
    scheduler.tick(105.0)
    scheduler.arrive(req)
    queued = req.tiered_kv_queued
    assert [what for what, _, _ in spy.heard] == ["arrival", "admission", "arrival"]
    assert (queued.n_retractions, queued.output_tokens) == (1, 2)
    assert (queued.arrival_s, queued.queued_s) == (100.0, 105.0)
    # What it had generated counts: eight tokens of prompt are two pages.
    assert queued.device_tokens == 2 * PAGE_SIZE
    assert scheduler.step() == ["r"]


def test_a_flush_under_waiting_requests(scheduler: MiniScheduler, spy: Spy, rig: Rig) -> None:
    rig.serve(tokens_of(1, 2))
    req = request("a", tokens_of(1, 2, 3))
    scheduler.arrive(req)
    assert req.tiered_kv_queued.device_tokens == 8
    rig.drain()
    rig.hierarchy.flush()
    scheduler.tiered_kv_order.queue.look_up_all()
    assert req.tiered_kv_queued.cached_tokens == 0
    assert scheduler.step() == ["a"]


# -- pages on their way ------------------------------------------------------------------------


def test_who_waits_for_pages_is_held_and_starts_when_they_are_there(
    rig: Rig, spy: Spy, scheduler: MiniScheduler
) -> None:
    stored = tokens_of(1, 2, 3)
    rig.serve(stored)
    rig.drain()
    rig.hierarchy.flush()
    rig.disk.reads.hold()
    rig.arrive("from disk", stored)
    req, other = request("from disk", stored), request("b")
    scheduler.arrive(req)
    scheduler.arrive(other)
    queue = scheduler.tiered_kv_order.queue
    assert queue.held == {1}
    assert scheduler.step() == ["b"]
    # The batch is full now, and nobody leaves it.
    scheduler.running_batch.batch_is_full = True
    assert scheduler.step() == []
    assert scheduler.offered is None
    rig.disk.reads.release()
    rig.poll_until(lambda: rig.hierarchy.prefetch.done("from disk"))
    assert scheduler.step() == ["from disk"]
    assert not queue.held


def test_a_full_batch_is_tried_again_for_whoever_joins(scheduler: MiniScheduler, spy: Spy) -> None:
    three(scheduler)
    scheduler.step()
    scheduler.running_batch.batch_is_full = True
    assert scheduler.step() == []
    assert scheduler.offered is None
    scheduler.arrive(request("urgent"))
    spy.order = [4]
    assert scheduler.step() == ["urgent"]


# -- how much is prefilled at once -------------------------------------------------------------


@pytest.mark.parametrize(
    ("planned", "chunk"), [(None, CHUNK), (1, 4), (11, 8), (CHUNK, CHUNK), (1000, CHUNK), (0, 4)]
)
def test_the_chunk_is_whole_pages_and_never_larger_than_configured(
    scheduler: MiniScheduler, spy: Spy, planned: int | None, chunk: int
) -> None:
    three(scheduler)
    spy.plan_fields = {"prefill_tokens": planned}
    scheduler.step()
    assert scheduler.chunk_seen == chunk
    assert scheduler.chunked_prefill_size == CHUNK


def test_no_prefill_while_somebody_decodes(scheduler: MiniScheduler, spy: Spy) -> None:
    scheduler.running_batch.reqs.append(running(scheduler, "r"))
    three(scheduler)
    spy.plan_fields = {"prefill_tokens": 0}
    assert scheduler.step() == []
    assert scheduler.offered is None
    assert scheduler.waiting == ["a", "b", "c"]


def test_mixed_decodes_take_theirs_of_the_chunk(scheduler: MiniScheduler, spy: Spy) -> None:
    scheduler.is_mixed_chunk = True
    scheduler.running_batch.reqs += [running(scheduler, "r"), running(scheduler, "s")]
    three(scheduler)
    spy.plan_fields = {"prefill_tokens": 12}
    scheduler.step()
    assert scheduler.chunk_seen == 8 + 2
    spy.plan_fields = {"prefill_tokens": 2}
    assert scheduler.step() == []


def test_decodes_are_mixed_in_where_the_plan_says_so(scheduler: MiniScheduler, spy: Spy) -> None:
    scheduler.running_batch.reqs.append(running(scheduler, "r"))
    three(scheduler)
    spy.plan_fields = {"prefill_tokens": 13, "mix_decodes": True}
    assert scheduler.step() == ["a"]
    assert (scheduler.chunk_seen, scheduler.mix_seen, scheduler.mixed) == (12 + 1, True, True)
    assert not scheduler.is_mixed_chunk
    scheduler.has_decode_memory = False
    assert scheduler.step() == ["b"]
    assert (scheduler.mix_seen, scheduler.mixed) == (True, False)


@pytest.mark.parametrize("chunk", [None, PAGE_SIZE])
def test_decodes_are_not_mixed_into_chunks_that_have_no_room(
    scheduler: MiniScheduler, spy: Spy, chunk: int | None
) -> None:
    scheduler.chunked_prefill_size = chunk
    scheduler.running_batch.reqs.append(running(scheduler, "r"))
    three(scheduler)
    spy.plan_fields = {"mix_decodes": True}
    assert scheduler.step() == ["a"]
    assert (scheduler.chunk_seen, scheduler.mixed) == (chunk, False)


def test_without_chunked_prefill_only_a_plan_of_none_counts(
    scheduler: MiniScheduler, spy: Spy
) -> None:
    scheduler.chunked_prefill_size = None
    three(scheduler)
    spy.plan_fields = {"prefill_tokens": 8}
    scheduler.step()
    assert scheduler.chunk_seen is None
    assert spy.states[0].chunk_tokens == scheduler.max_prefill_tokens


# -- a prompt that was begun --------------------------------------------------------------------


@pytest.fixture
def begun(scheduler: MiniScheduler, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> Req:
    """Two pages of its four are computed, the result of the second is still to come."""
    req = request("long", tokens_of(1, 2, 3, 4))
    scheduler.arrive(req)
    assert scheduler.step() == ["long"]
    scheduler.running_batch.reqs.clear()
    scheduler.chunked_req = req
    req.prefix_indices = range(2 * PAGE_SIZE)
    req.inflight_middle_chunks = 1
    rig.serve(tokens_of(1, 2))
    released: list[Req] = []
    monkeypatch.setattr(
        "sglang.srt.mem_cache.common.release_kv_cache",
        lambda req, cache, is_insert: released.append(req) if not is_insert else None,
    )
    req.released = released
    return req


def test_it_makes_way_and_waits_again_when_its_result_is_there(
    scheduler: MiniScheduler, spy: Spy, begun: Req
) -> None:
    scheduler.arrive(request("urgent"))
    spy.plan_fields = {"park_unfinished": True}
    assert scheduler.step() == ["urgent"]
    assert spy.states[-1].can_park
    assert spy.states[-1].unfinished is begun.tiered_kv_queued
    assert scheduler.chunked_req is None
    assert (scheduler.waiting, begun.released) == ([], [])

    begun.inflight_middle_chunks = 0
    scheduler_hooks.after_batch_result(None, scheduler)
    assert (scheduler.waiting, begun.released) == (["long"], [begun])
    assert spy.heard[-1][:2] == ("arrival", 1)
    queued: QueuedRequest = begun.tiered_kv_queued
    assert (queued.n_retractions, begun.retraction_count, begun.retracted_stain) == (0, 0, False)
    assert (queued.prefilled_tokens, queued.device_tokens) == (0, 2 * PAGE_SIZE)
    scheduler_hooks.after_batch_result(None, scheduler)
    assert scheduler.step() == ["long"]


def test_without_a_result_to_come_it_waits_again_at_once(
    scheduler: MiniScheduler, spy: Spy, begun: Req
) -> None:
    begun.inflight_middle_chunks = 0
    scheduler.arrive(request("urgent"))
    spy.plan_fields = {"park_unfinished": True}
    assert scheduler.step() == ["urgent"]
    assert scheduler.waiting == ["long"]


def test_where_nobody_is_admitted_it_goes_on(
    scheduler: MiniScheduler, spy: Spy, begun: Req
) -> None:
    scheduler.arrive(request("too large"))
    scheduler.admit = 0
    spy.plan_fields = {"park_unfinished": True}
    assert scheduler.step() == []
    assert scheduler.chunked_req is begun
    assert scheduler.waiting == ["too large"]


@pytest.mark.parametrize("field", ["return_logprob", "to_finish", "input_embeds"])
def test_some_cannot_make_way(scheduler: MiniScheduler, spy: Spy, begun: Req, field: str) -> None:
    setattr(begun, field, FINISH_ABORT() if field == "to_finish" else True)
    scheduler.arrive(request("urgent"))
    spy.plan_fields = {"park_unfinished": True}
    scheduler.step()
    assert not spy.states[-1].can_park
    assert scheduler.chunked_req is begun


# -- what a policy expects ---------------------------------------------------------------------


class Foreteller(Spy):
    def __init__(self) -> None:
        super().__init__()
        self.next = DemandForecast()

    def forecast(self, state: SchedulerState) -> DemandForecast:
        return self.next


def test_a_forecast_reaches_the_tiers_when_it_changes(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Foreteller()
    scheduler = MiniScheduler(rig, policy)
    scheduler.tick(1.0)
    given: list[DemandForecast] = []
    monkeypatch.setattr(rig.hierarchy, "forecast", given.append)
    for req in [request(rid) for rid in "abcd"]:
        scheduler.arrive(req)
    scheduler.step()
    policy.next = DemandForecast({1: Expectation(0.5)})
    scheduler.step()
    scheduler.step()
    assert given == [policy.next]


def test_without_a_policy_of_ours_sglang_is_left_alone() -> None:
    stock = SimpleNamespace(waiting_queue=[], policy=SimpleNamespace())
    assert scheduler_hooks.form_prefill(lambda s, **_: (s, 1), stock, running_batch=None) == (
        stock,
        1,
    )
    called = []
    scheduler_hooks.put_in_order(lambda *args: called.append(args), stock.policy, [], None)
    assert called == [(stock.policy, [], None)]
    scheduler_hooks.note_arrival(None, stock, request("a"))


def just_made(rig: Rig, policy: str, *, costs: CostModel | None) -> Any:
    """What `order_waiting_queue` finds of a scheduler."""
    parts = SimpleNamespace(
        hierarchy=rig.hierarchy,
        cost_model=costs,
        residency=ResidencyLog(rig.events),
        metrics=MetricsRecorder(),
    )
    args = SimpleNamespace(tiered_kv=True, tiered_kv_policy=policy, schedule_policy="fcfs")
    return SimpleNamespace(
        server_args=args,
        tree_cache=SimpleNamespace(parts=parts, request_order=None),
        policy=SimpleNamespace(),
        request_receiver=object(),
    )


def test_the_policy_named_is_put_in_charge(rig: Rig) -> None:
    costs = CostModel(find_model("Llama-3.1-8B"), find_device("H200-141"), {})
    scheduler = just_made(rig, "slack", costs=costs)
    scheduler_hooks.order_waiting_queue(None, scheduler)
    order = scheduler.tiered_kv_order
    assert isinstance(order, RequestOrder)
    assert scheduler.policy.tiered_kv_order is scheduler.tree_cache.request_order is order


def test_sglang_stays_in_charge_where_it_is_told_to_or_costs_are_unknown(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    costs = CostModel(find_model("Llama-3.1-8B"), find_device("H200-141"), {})
    told = just_made(rig, "upstream", costs=costs)
    scheduler_hooks.order_waiting_queue(None, told)
    assert not caplog.records
    unknown = just_made(rig, "slack", costs=None)
    scheduler_hooks.order_waiting_queue(None, unknown)
    assert "--schedule-policy fcfs orders the queue" in caplog.text
    for scheduler in (told, unknown):
        assert not hasattr(scheduler, "tiered_kv_order")
        assert scheduler.tree_cache.request_order is None


def test_the_bound_on_waiting(scheduler: MiniScheduler) -> None:
    patient, impatient = request("a"), request("b")
    impatient.tiered_kv_terms = Terms(slo=Slo("interactive", max_wait_s=3.0))
    scheduler.arrive(patient)
    scheduler.arrive(impatient)
    queue = scheduler.tiered_kv_order.queue
    assert queue.wait_over_bound_s(102.0, None) == 0
    assert queue.wait_over_bound_s(105.0, None) == 2.0
    assert queue.wait_over_bound_s(105.0, 1.0) == 4.0
