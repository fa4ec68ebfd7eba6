"""A policy over SGLang's queue: real requests of SGLang's, real tiers, a scheduler in miniature.

Guarantee: for one call the queue is what the plan offers, afterwards it is whole, in the order of
arrival; a prefill is as large as the plan says, in whole pages.
"""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")


from support_plugin.mini_scheduler import CHUNK, MiniScheduler, Spy, request, running, three
from support_tiers.tier_rig import PAGE_SIZE, Rig, tokens_of
from tiered_kv.api.trust import Trust
from tiered_kv.core.device_spec import find_device
from tiered_kv.core.model_spec import find_model
from tiered_kv.memory.demand import DemandForecast, Expectation
from tiered_kv.plugin.cache.metrics_adapter import MetricsRecorder
from tiered_kv.plugin.cache.residency_log import ResidencyLog
from tiered_kv.plugin.hooks import scheduler as scheduler_hooks
from tiered_kv.plugin.queue.order import RequestOrder
from tiered_kv.scheduler.cost_model import CostModel
from tiered_kv.scheduler.plan import PLAN_LIMIT
from tiered_kv.scheduler.request_policy import SchedulerState

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
    assert not scheduler.tiered_kv_order.queue.lives.wants_time


def test_who_lacks_an_adapter_is_passed_unless_nobody_may_pass(
    scheduler: MiniScheduler, spy: Spy
) -> None:
    three(scheduler)
    scheduler.running_batch.reqs.append(running(scheduler, "r"))
    scheduler.lacks_adapter = {"a"}
    assert scheduler.step() == ["b"]
    spy.plan_fields = {"first_or_none": True}
    for _ in range(3):
        assert scheduler.step() == []
    assert scheduler.waiting == ["a", "c"]
    scheduler.lacks_adapter = {"c"}
    assert scheduler.step() == ["a"]
    scheduler.lacks_adapter.clear()
    assert scheduler.step() == ["c"]


def test_nobody_is_waited_for_while_nothing_runs_that_could_make_way(
    scheduler: MiniScheduler, spy: Spy
) -> None:
    three(scheduler)
    scheduler.lacks_adapter = {"a"}
    spy.plan_fields = {"first_or_none": True}
    assert scheduler.step() == ["b"]
    assert scheduler.step() == [], "now something does"


def test_helpers_of_sglangs_see_everyone_who_waits(rig: Rig, spy: Spy) -> None:
    seen: list[list[str]] = []
    asked: list[dict[str, Any]] = []
    drainer = SimpleNamespace(
        update_draining_state=lambda queue, _: seen.append([req.rid for req in queue])
    )
    delayer = SimpleNamespace(_negotiate_should_allow_prefill=lambda **kwargs: asked.append(kwargs))
    scheduler = MiniScheduler(rig, spy, lora_drainer=drainer, prefill_delayer=delayer)
    three(scheduler)
    spy.order = [3]
    scheduler.step()
    assert scheduler.offered == ["c"]
    assert seen == [["a", "b", "c"]]
    assert asked == [{"waiting_queue_len": 3}]
    drainer.update_draining_state(scheduler.waiting_queue, [])
    delayer._negotiate_should_allow_prefill(waiting_queue_len=7)
    assert (seen[-1], asked[-1]) == (["a", "b"], {"waiting_queue_len": 7})


def test_a_request_that_waits_for_pages_is_computed_if_the_plan_says_so(
    scheduler: MiniScheduler, spy: Spy, rig: Rig
) -> None:
    stored = tokens_of(1, 2, 3)
    rig.serve(stored)
    rig.drain()
    rig.hierarchy.flush()
    rig.disk.reads.hold()
    rig.arrive("a", stored)
    scheduler.arrive(request("a", stored))
    scheduler.arrive(request("b"))
    scheduler.admit = 0
    assert scheduler.step() == []
    (state,) = spy.states
    assert state.held[1].tokens == 3 * PAGE_SIZE
    assert scheduler.offered == ["b"]
    spy.order, scheduler.admit = [1, 2], 1
    assert scheduler.step() == ["a"]
    assert not scheduler.tiered_kv_order.queue.held
    rig.hierarchy.prefetch.release("a")
    rig.disk.reads.release()
    rig.drain()


def test_reads_from_disk_are_in_the_policys_order(
    scheduler: MiniScheduler, spy: Spy, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    reqs = [request(rid, tokens_of(n, n + 1, n + 2)) for n, rid in ((10, "a"), (20, "b"))]
    for req in reqs:
        rig.serve(req.origin_input_ids)
        rig.drain()
    rig.hierarchy.flush()
    monkeypatch.setattr(spy, "urgency", lambda queued: (0.0, -queued.request_id))
    root, read, read_pages = rig.hierarchy.root(), [], rig.disk.read_pages

    def note(hashes: Any, views: Any) -> int:
        read.append(hashes[0])
        return int(read_pages(hashes, views))

    monkeypatch.setattr(rig.disk, "read_pages", note)
    rig.disk.reads.delay = lambda: 0.02
    for req in reqs:
        rig.hierarchy.prefetch.request(req.rid, root, req.origin_input_ids)
        scheduler.arrive(req)
    scheduler.admit = 0
    scheduler.step()
    rig.drain()
    assert read == [rig.hashes(root, req.origin_input_ids)[0] for req in reversed(reqs)]
    rig.hierarchy.prefetch.clear()


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
    scheduler_hooks.add_to_queue(lambda *args: called.append(args), stock, request("a"))
    assert len(called) == 2


def just_made(rig: Rig, policy: str, *, costs: CostModel | None) -> Any:
    """What `order_waiting_queue` finds of a scheduler."""
    parts = SimpleNamespace(
        hierarchy=rig.hierarchy,
        cost_model=costs,
        residency=ResidencyLog(rig.events),
        metrics=MetricsRecorder(),
    )
    args = SimpleNamespace(
        tiered_kv=True,
        tiered_kv_policy=policy,
        tiered_kv_never_pause=False,
        schedule_policy="fcfs",
        trust=Trust,
    )
    return SimpleNamespace(
        server_args=args,
        tree_cache=SimpleNamespace(parts=parts, observer=None),
        policy=SimpleNamespace(),
        request_receiver=object(),
        lora_drainer=None,
        prefill_delayer=None,
    )


def test_the_policy_named_is_put_in_charge(rig: Rig) -> None:
    costs = CostModel(find_model("Llama-3.1-8B"), find_device("H200-141"), {})
    scheduler = just_made(rig, "slack", costs=costs)
    scheduler_hooks.order_waiting_queue(None, scheduler)
    order = scheduler.tiered_kv_order
    assert isinstance(order, RequestOrder)
    assert scheduler.policy.tiered_kv_order is scheduler.tree_cache.observer is order


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
        assert scheduler.tree_cache.observer is None
