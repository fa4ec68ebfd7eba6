"""What a caller says of its next call keeps the prefix, and brings it back before that comes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("sglang")

import torch
from sglang.srt.managers.io_struct import AbortReq

from support_plugin.decode_loop import DecodeLoop
from support_plugin.decode_requests import Kind, light_costs, publish_arguments
from support_plugin.mini_scheduler import MiniScheduler, request
from support_tiers.tier_rig import PAGE_SIZE, Rig, on_host, tokens_of
from tiered_kv.api.hints import Hints
from tiered_kv.api.terms import Terms
from tiered_kv.plugin.foretold import REFRESH_S

PROMPT = tokens_of(1, 2, 3)


def hinted(rid: str, *hints: float) -> Any:
    req = request(rid, PROMPT)
    req.tiered_kv_terms = Terms(hints=Hints(None, *hints))
    return req


def announce(scheduler: MiniScheduler, rig: Rig, *hints: float) -> None:
    last = rig.hierarchy.match(rig.hierarchy.root(), PROMPT).last
    scheduler.tiered_kv_order.ended(hinted("a", *hints), last)


def pages_on_device(rig: Rig) -> int:
    rig.drain()
    return rig.usable(PROMPT)[0]


def test_a_prefix_is_brought_back_before_the_call_comes(scheduler: MiniScheduler, rig: Rig) -> None:
    on_host(rig, PROMPT)
    announce(scheduler, rig, 30.0)
    scheduler.tick(115.0)
    assert pages_on_device(rig) == 0, "too early"
    scheduler.tick(122.0)
    assert pages_on_device(rig) == len(PROMPT) // PAGE_SIZE


@pytest.mark.parametrize("hints", [(), (5.0, 0.2), (5.0, 0.0)])
def test_without_a_hint_or_much_hope_nothing_is_brought(
    scheduler: MiniScheduler, rig: Rig, hints: tuple[float, ...]
) -> None:
    on_host(rig, PROMPT)
    announce(scheduler, rig, *hints)
    scheduler.tick(101.0 + REFRESH_S)
    assert pages_on_device(rig) == 0


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


@pytest.fixture(scope="module")
def args(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    torch.compiler.set_stance("force_eager")
    yield publish_arguments(tmp_path_factory.mktemp("model"))
    torch.compiler.set_stance("default")


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
