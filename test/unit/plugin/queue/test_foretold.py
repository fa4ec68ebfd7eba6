"""What a caller says of its next call keeps the prefix, and brings it back before that comes."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("sglang")

from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import FINISH_LENGTH, FINISH_MATCHED_TOKEN

from support_plugin.decode_loop import DecodeLoop
from support_plugin.decode_requests import Kind, light_costs
from support_plugin.mini_scheduler import MiniScheduler, request
from support_tiers.tier_rig import PAGE_SIZE, Rig, on_host, tokens_of
from tiered_kv.api.hints import Hints
from tiered_kv.api.terms import Terms
from tiered_kv.core.ids import Tier
from tiered_kv.forest.key import TreeKey
from tiered_kv.memory.manager import LOAD_AHEAD_S
from tiered_kv.plugin.queue.foretold import FETCH_AHEAD_S, REFRESH_S
from tiered_kv.scheduler.pauses import LEAST
from tiered_kv.tiers import announced_prompts

PROMPT = tokens_of(1, 2, 3)
N_PAGES = len(PROMPT) // PAGE_SIZE


def hinted(rid: str, *hints: float) -> Any:
    req = request(rid, PROMPT)
    req.tiered_kv_terms = Terms(hints=Hints(None, *hints))
    req.finished_reason = FINISH_LENGTH(1)
    return req


def announce(scheduler: MiniScheduler, rig: Rig, *hints: float) -> None:
    last = rig.hierarchy.match(rig.hierarchy.root(), PROMPT).last
    scheduler.tiered_kv_order.released(hinted("a", *hints), last)


def pages_on_device(rig: Rig) -> int:
    rig.drain()
    return rig.usable(PROMPT)[0]


def test_a_prefix_is_brought_back_before_the_call_comes(scheduler: MiniScheduler, rig: Rig) -> None:
    on_host(rig, PROMPT)
    announce(scheduler, rig, 30.0)
    scheduler.tick(115.0)
    assert pages_on_device(rig) == 0, "too early"
    scheduler.tick(122.0)
    assert pages_on_device(rig) == N_PAGES


@pytest.mark.parametrize("hints", [(), (5.0, 0.2), (5.0, 0.0)])
def test_without_a_hint_or_much_hope_nothing_is_brought(
    scheduler: MiniScheduler, rig: Rig, hints: tuple[float, ...]
) -> None:
    on_host(rig, PROMPT)
    announce(scheduler, rig, *hints)
    scheduler.tick(101.0 + REFRESH_S)
    assert pages_on_device(rig) == 0


def only_on_disk(rig: Rig) -> None:
    rig.drain()
    assert rig.stored_pages(PROMPT) == N_PAGES
    rig.drop_from_device()
    rig.drop_from_host()
    assert rig.usable(PROMPT) == (0, 0)


def test_what_only_the_disk_has_comes_back_tier_by_tier(scheduler: MiniScheduler, rig: Rig) -> None:
    rig.serve(PROMPT)
    announce(scheduler, rig, 60.0)
    only_on_disk(rig)
    scheduler.tick(160.0 - FETCH_AHEAD_S - 1.0)
    rig.drain()
    assert rig.usable(PROMPT) == (0, 0), "too early"
    scheduler.tick(160.0 - FETCH_AHEAD_S + 1.0)
    rig.drain()
    assert rig.usable(PROMPT) == (0, N_PAGES)
    scheduler.tick(160.0 - FETCH_AHEAD_S + 3.0)
    assert not rig.hierarchy.prefetch.tickets, "what has come is ordinary cache"
    assert rig.usable(PROMPT) == (0, N_PAGES)
    scheduler.tick(160.0 - LOAD_AHEAD_S + 1.0)
    assert pages_on_device(rig) == N_PAGES
    rig.check_idle()


def test_where_nobody_hints_the_pause_is_learned(scheduler: MiniScheduler, rig: Rig) -> None:
    """A program that came back a minute after each answer is expected a minute after the last."""
    rig.serve(PROMPT)
    last = rig.hierarchy.match(rig.hierarchy.root(), PROMPT).last
    foretold, now_s = scheduler.tiered_kv_order.foretold, 100.0
    for number in range(LEAST + 1):
        assert not foretold.calls
        scheduler.tick(now_s)
        req = request(f"call {number}", PROMPT)
        req.tiered_kv_terms = Terms(hints=Hints(session_id="agent"))
        scheduler.arrive(req)
        assert scheduler.step() == [req.rid]
        req.output_ids, req.finished_reason = [5, 7, 8], FINISH_MATCHED_TOKEN(8)
        scheduler.tiered_kv_order.released(req, last)
        now_s += 60.0
    (expected,) = foretold.calls.expected(now_s - 60.0).values()
    assert expected.starts_in_s == pytest.approx(60.0, rel=0.2)
    assert expected.probability > 0.5
    only_on_disk(rig)
    scheduler.tick(now_s - FETCH_AHEAD_S - 15.0)
    rig.drain()
    assert rig.usable(PROMPT) == (0, 0), "too early"
    scheduler.tick(now_s - FETCH_AHEAD_S / 2)
    rig.drain()
    assert rig.usable(PROMPT) == (0, N_PAGES)


def test_other_keys_prompts_are_found_under_their_keys(scheduler: MiniScheduler, rig: Rig) -> None:
    tenant = TreeKey(extra_key=b"tenant")
    rig.serve(PROMPT, tenant)
    last = rig.hierarchy.match(rig.hierarchy.root(tenant), PROMPT).last
    req = hinted("a", 60.0)
    req.extra_key = tenant
    scheduler.tiered_kv_order.released(req, last)
    rig.drain()
    rig.drop_from_device()
    rig.drop_from_host()
    scheduler.tick(155.0)
    rig.drain()
    assert rig.usable(PROMPT, tenant) == (0, N_PAGES)
    assert rig.usable(PROMPT) == (0, 0)


@pytest.mark.parametrize("comes", [True, False])
def test_a_fetch_ends_with_the_call_or_with_the_wait_for_it(
    scheduler: MiniScheduler, rig: Rig, comes: bool
) -> None:
    rig.serve(PROMPT)
    announce(scheduler, rig, 60.0)
    only_on_disk(rig)
    rig.disk.reads.hold()
    scheduler.tick(150.0)
    assert len(rig.hierarchy.prefetch.tickets) == 1
    if comes:
        scheduler.arrive(request("b", PROMPT))
        scheduler.step()
    scheduler.tick(300.0)
    foretold = scheduler.tiered_kv_order.foretold
    assert not foretold.calls
    assert not foretold.prompts
    assert not [name for name in rig.hierarchy.prefetch.tickets if name != "b"]
    rig.disk.reads.release()
    rig.drain()


def test_looking_for_an_announced_prompt_is_no_use_of_it(
    scheduler: MiniScheduler, rig: Rig
) -> None:
    rig.serve(PROMPT)
    prompts = scheduler.tiered_kv_order.foretold.prompts
    node = rig.hierarchy.match(rig.hierarchy.root(), PROMPT).last
    prompts.remember(node, None)
    before = node.hits, node.last_access
    assert prompts.fetch(node.node_id) == node.node_id
    assert (node.hits, node.last_access) == before


def test_the_oldest_prompts_are_forgotten_beyond_a_bound(
    scheduler: MiniScheduler, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(announced_prompts, "TOKENS_MAX", 2 * len(PROMPT))
    prompts = scheduler.tiered_kv_order.foretold.prompts
    for first in (1, 20, 40):
        tokens = tokens_of(first, first + 1, first + 2)
        rig.serve(tokens)
        prompts.remember(rig.hierarchy.match(rig.hierarchy.root(), tokens).last, None)
    assert len(prompts) == 2


def test_what_the_queue_wants_is_not_forgotten_over_what_was_announced(
    scheduler: MiniScheduler, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[int, Any]] = []
    monkeypatch.setattr(rig.hierarchy, "forecast", lambda forecast: told.append(forecast.next_use))
    on_host(rig, PROMPT)
    node_id = rig.hierarchy.match(rig.hierarchy.root(), PROMPT).last.node_id
    announce(scheduler, rig, 30.0)
    assert [set(expected) for expected in told] == [{node_id}]
    scheduler.tick(100.0 + REFRESH_S / 2)
    assert len(told) == 1, "not with every tick"
    scheduler.tick(110.0)
    assert told[-1][node_id].starts_in_s == pytest.approx(20.0)
    scheduler.arrive(request("b", PROMPT))
    scheduler.step()
    scheduler.tick(120.0)
    assert told[-1] == {}, "the call has come"
    n = len(told)
    scheduler.tick(130.0)
    assert len(told) == n


def test_on_the_scheduler_s_loop_an_answer_announces_where_it_ended(args: Any) -> None:
    loop = DecodeLoop(args, overlap=True)
    loop.govern("slack", "slack", light_costs())
    kind = Kind(family=0, seed=1, n_own=10, max_new_tokens=9, sampling={"ignore_eos": True})
    plain, req, aborted = (kind.request(rid) for rid in ("plain", "hinted", "aborted"))
    for one in (req, aborted):
        one.tiered_kv_terms = Terms(hints=Hints(next_call_in_s=60.0))
    loop.serve(plain)
    calls = loop.tiered_kv_order.foretold.calls
    assert not calls
    loop.serve(req)
    (node_id,) = calls.expected(0.0)
    node = loop.tree_cache.hierarchy.context.forest.find(node_id)
    assert node is not None
    assert node.end == (len(req.origin_input_ids) + 8) // loop.page_size * loop.page_size
    calls.came([node_id])
    loop.arrive(aborted)
    loop.run(lambda: len(aborted.output_ids) < 3)
    loop.abort_request(AbortReq(rid="aborted"))
    loop.run(lambda: not loop.is_at_rest)
    assert not calls
    loop.close()


@pytest.mark.parametrize(("hints", "is_let_go"), [((0.0, 0.0), True), ((0.0, 1.0), False)])
def test_who_says_that_no_call_follows_lets_its_pages_go(
    scheduler: MiniScheduler, rig: Rig, hints: tuple[float, ...], is_let_go: bool
) -> None:
    rig.serve(PROMPT)
    rig.serve(tokens_of(7))
    announce(scheduler, rig, *hints)
    rig.drain()
    context = rig.hierarchy.context
    (drop,) = context.manager.on_pressure(Tier.DEVICE, 1)
    last = rig.hierarchy.match(rig.hierarchy.root(), PROMPT).last
    assert (drop.node_id == last.node_id) is is_let_go
