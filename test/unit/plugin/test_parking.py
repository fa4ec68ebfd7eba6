"""A prompt that was begun makes way, and waits again once its last result is there."""

from __future__ import annotations

import pytest

pytest.importorskip("sglang")

from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req

from support_plugin.mini_scheduler import MiniScheduler, Spy, request
from support_tiers.tier_rig import PAGE_SIZE, Rig, tokens_of
from tiered_kv.plugin import scheduler_hooks
from tiered_kv.scheduler.request import QueuedRequest

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
