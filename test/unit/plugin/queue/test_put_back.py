"""A prompt that was begun is put back, and waits again once its last result is there."""

from __future__ import annotations

import pytest

pytest.importorskip("sglang")

from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req

from support_plugin.mini_scheduler import MiniScheduler, Spy, request, running
from support_tiers.tier_rig import PAGE_SIZE, Rig, tokens_of
from tiered_kv.plugin.hooks import scheduler as scheduler_hooks
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
    req.prefix_indices, req.prefix_len = range(2 * PAGE_SIZE), 2 * PAGE_SIZE
    req.inflight_middle_chunks = 1
    rig.serve(tokens_of(1, 2))
    released: list[Req] = []
    monkeypatch.setattr(
        "sglang.srt.mem_cache.common.release_kv_cache",
        lambda req, cache, **how: (
            released.append(req),
            scheduler.tiered_kv_order.queue.released(req),
        ),
    )
    req.released = released
    return req


def test_it_is_put_back_and_waits_again_when_its_result_is_there(
    scheduler: MiniScheduler, spy: Spy, begun: Req
) -> None:
    scheduler.arrive(request("urgent"))
    spy.plan_fields = {"put_back_unfinished": True}
    assert scheduler.step() == ["urgent"]
    assert spy.states[-1].can_put_back
    assert spy.states[-1].unfinished is begun.tiered_kv_queued
    assert scheduler.chunked_req is None
    assert (scheduler.waiting, begun.released) == ([], [])

    begun.inflight_middle_chunks = 0
    scheduler_hooks.after_batch_result(None, scheduler)
    assert (scheduler.waiting, begun.released) == (["long"], [begun])
    assert spy.heard[-1][:2] == ("arrival", 1)
    queued: QueuedRequest = begun.tiered_kv_queued
    assert (queued.n_retractions, begun.retraction_count) == (0, 0)
    assert begun.retracted_stain, "SGLang would count what it computed itself as cached"
    assert (queued.prefilled_tokens, queued.device_tokens) == (0, 2 * PAGE_SIZE)
    scheduler_hooks.after_batch_result(None, scheduler)
    assert scheduler.step() == ["long"]


def test_without_a_result_to_come_it_waits_again_at_once(
    scheduler: MiniScheduler, spy: Spy, begun: Req
) -> None:
    begun.inflight_middle_chunks = 0
    scheduler.arrive(request("urgent"))
    spy.plan_fields = {"put_back_unfinished": True}
    assert scheduler.step() == ["urgent"]
    assert scheduler.waiting == ["long"]


def test_where_nobody_fits_without_it_it_goes_on_in_the_same_pass(
    scheduler: MiniScheduler, spy: Spy, begun: Req
) -> None:
    """Neither of them would get anywhere if it was tried anew in each pass."""
    scheduler.arrive(request("too large"))
    scheduler.admit = 0
    spy.plan_fields = {"put_back_unfinished": True}
    assert scheduler.step() == []
    assert [state.can_put_back for state in spy.states[-2:]] == [True, False]
    assert scheduler.chunks_seen[-2:] == [None, begun]
    assert scheduler.chunked_req is begun
    assert scheduler.waiting == ["too large"]
    scheduler.step()
    assert spy.states[-2].can_put_back, "it is tried again when memory may have come back"


@pytest.mark.parametrize("field", ["return_logprob", "to_finish", "input_embeds"])
def test_some_cannot_be_put_back(
    scheduler: MiniScheduler, spy: Spy, begun: Req, field: str
) -> None:
    setattr(begun, field, FINISH_ABORT() if field == "to_finish" else True)
    scheduler.arrive(request("urgent"))
    spy.plan_fields = {"put_back_unfinished": True}
    scheduler.step()
    assert not spy.states[-1].can_put_back
    assert scheduler.chunked_req is begun


# -- memory for it ------------------------------------------------------------------------------


@pytest.mark.parametrize("is_mixed", [False, True])
def test_it_goes_on_as_far_as_there_is_memory_while_somebody_decodes(
    scheduler: MiniScheduler, rig: Rig, begun: Req, is_mixed: bool
) -> None:
    """SGLang would go on without, and stop the server."""
    allocator = rig.context.allocator
    scheduler.is_mixed_chunk = is_mixed
    scheduler.running_batch.reqs.append(running(scheduler, "r"))
    for n_pages in (2, 1):
        allocator.alloc(allocator.available() - n_pages * PAGE_SIZE)
        scheduler.arrive(request(f"beside {n_pages}"))
        n_mixed = len(scheduler.running_batch.reqs) if is_mixed else 0
        scheduler.step()
        assert scheduler.chunk_seen == n_pages * PAGE_SIZE + n_mixed
    allocator.alloc(allocator.available())
    scheduler.arrive(request("a third"))
    assert scheduler.step() == []
    assert scheduler.chunked_req is begun
    assert scheduler.waiting == ["a third"]
    scheduler.running_batch.reqs.clear()
    assert scheduler.step() == ["a third"], "nobody could make room for it"
