"""What a policy sees of SGLang's requests, and what it hears.

Guarantee: the policy hears of everything that happens to a request, in that order; what happens
between two ticks is dated by the second; nobody who is gone stays known; what is cached of those
who wait is up to date, and nothing is looked up in vain.
"""

from __future__ import annotations

from array import array

import pytest

pytest.importorskip("sglang")

from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH, Req

from support_plugin import on_release
from support_plugin.mini_scheduler import MiniScheduler, Spy, request, running, three
from support_tiers.tier_rig import PAGE_SIZE, Rig, on_host, tokens_of
from tiered_kv.api.hints import Hints
from tiered_kv.api.slo import Slo
from tiered_kv.api.terms import Terms
from tiered_kv.memory.demand import DemandForecast, Expectation
from tiered_kv.scheduler.program_names import program_of
from tiered_kv.scheduler.request import QueuedRequest

#: The scheduler in miniature asks for news within a prefill, and looks at full batches again, as
#: 0.5.17's does.
polled_within = pytest.mark.skipif(
    not on_release.IS_0_5_17, reason="this release asks for news before it forms a prefill"
)

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


def test_who_lost_its_prefix_to_the_disk_gets_it_back_while_it_waits(
    scheduler: MiniScheduler, rig: Rig
) -> None:
    """As in a long queue: what was cached when it came has left device and host by its turn."""
    rig.serve(tokens_of(1, 2, 3))
    rig.drain()
    req = request("a", tokens_of(1, 2, 3, 9))
    scheduler.arrive(req)
    queue, queued = scheduler.tiered_kv_order.queue, req.tiered_kv_queued
    rig.drop_from_device()
    rig.drop_from_host()
    queue.look_up_changed()
    assert queued.cached_tokens == 0
    queue.fetch_again([queued.request_id])
    queue.hold_or_let_go()
    assert queue.held == {}, "its patience runs from its arrival"
    rig.drain()
    queue.look_up_changed()
    assert queued.host_tokens == 3 * PAGE_SIZE


def test_the_program_is_named_by_caller_and_tenant_or_goes_on_from_another(
    scheduler: MiniScheduler, rig: Rig
) -> None:
    queue = scheduler.tiered_kv_order.queue
    hints = Hints(session_id="s", parent_session_id="p", session_final=True, priority=7)
    named = request("a", tokens_of(1, 2))
    named.tiered_kv_terms = Terms(hints=hints, tenant="t")
    scheduler.arrive(named)
    seen = named.tiered_kv_queued
    assert (seen.program, seen.parent_program) == (program_of("t", "s"), program_of("t", "p"))
    assert (seen.is_last_call, seen.priority) == (True, 7)

    first = request("b", tokens_of(5, 6))
    scheduler.arrive(first)
    rig.serve(tokens_of(5, 6, 7))
    queue.ended(first, rig.hierarchy.match(rig.hierarchy.root(), tokens_of(5, 6, 7)).last)
    after, other = request("c", tokens_of(5, 6, 7, 8)), request("d", tokens_of(5, 9))
    for req in (after, other):
        scheduler.arrive(req)
    assert after.tiered_kv_queued.program == first.tiered_kv_queued.program != ""
    assert other.tiered_kv_queued.program != first.tiered_kv_queued.program


def test_what_came_ahead_counts_for_the_tier_that_it_came_from(
    scheduler: MiniScheduler, rig: Rig
) -> None:
    prompt = tokens_of(1, 2, 3)
    on_host(rig, prompt)
    node = rig.hierarchy.match(rig.hierarchy.root(), prompt).last
    rig.hierarchy.forecast(DemandForecast({node.node_id: Expectation(0.1)}))
    rig.drain()
    first, second = request("a", prompt), request("b", prompt)
    first.storage_hit_length = PAGE_SIZE
    for req in (first, second):
        scheduler.arrive(req)
        scheduler.step()
    found = [
        (req.cached_tokens_device, req.cached_tokens_host, req.cached_tokens_storage)
        for req in (first, second)
    ]
    assert found == [(0, 2 * PAGE_SIZE, PAGE_SIZE), (3 * PAGE_SIZE, 0, 0)]


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


def test_who_is_aborted_while_waiting_is_forgotten_by_an_idle_server(
    scheduler: MiniScheduler, spy: Spy
) -> None:
    """Rank 0 would tick for ever, and the longest wait would go on rising."""
    order = scheduler.tiered_kv_order
    scheduler.arrive(request("a"))
    scheduler.waiting_queue.clear()
    assert order.clock.read([]) is not None
    scheduler.tick(500.0)
    assert spy.heard[-1] == ("abort", 1, 500.0)
    assert order.clock.read([]) is None
    assert order.queue.wait_over_bound_s(1.0) == 0
    assert len(order.queue.lives) == len(order.queue.waiting) == 0


def test_who_finishes_is_heard_of_at_once_and_dated_with_the_next_tick(
    scheduler: MiniScheduler, spy: Spy
) -> None:
    req = running(scheduler, "r")
    queue = scheduler.tiered_kv_order.queue
    queue.first_token(req)
    scheduler.tick(102.0)
    assert req.tiered_kv_queued.first_token_s == 102.0
    req.finished_reason = FINISH_LENGTH(2)
    queue.released(req)
    assert spy.heard[-1] == ("finish", 1, 102.0)
    assert queue.lives.wants_time
    scheduler.tick(103.0)
    queued = req.tiered_kv_queued
    assert (queued.first_token_s, queued.last_token_s, queued.output_tokens) == (102.0, 103.0, 2)
    assert not queue.lives.wants_time


def test_who_is_aborted_while_running(scheduler: MiniScheduler, spy: Spy) -> None:
    req = running(scheduler, "r")
    req.finished_reason = FINISH_ABORT()
    scheduler.tiered_kv_order.queue.released(req)
    assert spy.heard[-1] == ("abort", 1, 100.0)
    scheduler.tick(103.0)
    assert len(spy.heard) == 3


def test_who_gives_up_its_kv_and_is_not_queued_again_was_aborted(
    scheduler: MiniScheduler, spy: Spy
) -> None:
    """Out of memory, SGLang aborts the last request without finishing it."""
    req = running(scheduler, "r")
    req.to_finish = FINISH_ABORT("out of memory")
    queue = scheduler.tiered_kv_order.queue
    queue.released(req)
    assert spy.heard[-1][0] == "admission", "it may still come back"
    assert queue.lives.wants_time
    scheduler.tick(103.0)
    assert spy.heard[-1] == ("abort", 1, 103.0)
    assert not queue.lives.wants_time


def retract(scheduler: MiniScheduler, req: Req) -> None:
    """As SGLang does it."""
    scheduler.tiered_kv_order.queue.released(req)
    req.reset_for_retract()
    scheduler.arrive(req)


def test_who_is_retracted_waits_again(scheduler: MiniScheduler, spy: Spy, rig: Rig) -> None:
    req = running(scheduler, "r")
    rig.serve(req.origin_input_ids + array("q", [5, 6, 0, 0]))
    scheduler.tick(105.0)
    retract(scheduler, req)
    queued = req.tiered_kv_queued
    assert [what for what, _, _ in spy.heard] == ["arrival", "admission", "arrival"]
    assert (queued.n_retractions, queued.output_tokens) == (1, 2)
    assert (queued.arrival_s, queued.queued_s) == (100.0, 105.0)
    # What it had generated counts: eight tokens of prompt are two pages.
    assert queued.device_tokens == 2 * PAGE_SIZE
    assert scheduler.step() == ["r"]


@pytest.mark.parametrize("is_chunk", [False, True])
def test_who_was_aborted_and_is_retracted_ends_instead_of_waiting(
    scheduler: MiniScheduler, spy: Spy, is_chunk: bool
) -> None:
    """SGLang would compute all of it again only to end it; a prompt in chunks it would revive."""
    req = running(scheduler, "r")
    if is_chunk:
        scheduler._pending_chunked_abort_req = req
    else:
        req.to_finish = FINISH_ABORT("gone")
    retract(scheduler, req)
    assert scheduler.waiting == []
    assert spy.heard[-1] == ("abort", 1, 100.0)
    (answer,) = scheduler.sent
    assert answer.rid == "r"
    assert answer.finished_reason == (None if is_chunk else FINISH_ABORT("gone").to_json())
    assert scheduler._pending_chunked_abort_req is None
    scheduler.tick(101.0)
    assert len(scheduler.tiered_kv_order.queue.lives) == 0


def test_who_is_to_end_from_the_first_is_left_to_sglang(scheduler: MiniScheduler) -> None:
    """A request that is not valid gets its answer by way of the queue."""
    req = request("invalid")
    req.to_finish = FINISH_ABORT("too long")
    scheduler.arrive(req)
    assert scheduler.step() == ["invalid"]


def test_who_finds_the_queue_full_is_over(scheduler: MiniScheduler, spy: Spy) -> None:
    req = running(scheduler, "r")
    scheduler.has_queue_room = False
    retract(scheduler, req)
    assert spy.heard[-1] == ("abort", 1, 100.0)
    scheduler.arrive(request("new"))
    assert len(spy.heard) == 3, "nobody had heard of it"
    assert len(scheduler.tiered_kv_order.queue.lives) == 0


def test_a_flush_under_waiting_requests(scheduler: MiniScheduler, spy: Spy, rig: Rig) -> None:
    rig.serve(tokens_of(1, 2))
    req = request("a", tokens_of(1, 2, 3))
    scheduler.arrive(req)
    assert req.tiered_kv_queued.device_tokens == 8
    rig.drain()
    rig.hierarchy.flush()
    scheduler.tiered_kv_order.emptied()
    assert req.tiered_kv_queued.cached_tokens == 0
    assert spy.changes == [1], "what it costs has changed"
    assert scheduler.step() == ["a"]


# -- pages on their way ------------------------------------------------------------------------


@polled_within
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
    assert list(queue.held) == [1]
    assert scheduler.step() == ["b"]
    # The batch is full now, and nobody leaves it.
    scheduler.running_batch.batch_is_full = True
    assert scheduler.step() == []
    assert scheduler.offered is None
    rig.disk.reads.release()
    rig.poll_until(lambda: rig.hierarchy.prefetch.done("from disk"))
    assert scheduler.step() == ["from disk"]
    assert not queue.held


@polled_within
def test_a_full_batch_is_tried_again_for_whoever_joins(scheduler: MiniScheduler, spy: Spy) -> None:
    three(scheduler)
    scheduler.step()
    scheduler.running_batch.batch_is_full = True
    assert scheduler.step() == []
    assert scheduler.offered is None
    scheduler.arrive(request("urgent"))
    spy.order = [4]
    assert scheduler.step() == ["urgent"]


def test_the_bound_on_waiting(scheduler: MiniScheduler) -> None:
    patient, impatient = request("a"), request("b")
    impatient.tiered_kv_terms = Terms(slo=Slo("interactive", max_wait_s=3.0))
    scheduler.arrive(patient)
    scheduler.arrive(impatient)
    queue = scheduler.tiered_kv_order.queue
    scheduler.tick(102.0)
    assert queue.wait_over_bound_s(None) == 0
    scheduler.tick(105.0)
    assert queue.wait_over_bound_s(None) == 2.0
    assert queue.wait_over_bound_s(1.0) == 4.0
