"""SGLang's own loop of a prefill server with our order, loads that fail, decode servers that wait.

Guarantee: everyone is known to the order from when a decode server has room, nothing is sent twice
or before it is there, and whatever fails, nothing is held in the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("sglang")

from sglang.srt.disaggregation.base import KVPoll

from support_plugin import on_release
from support_plugin.decode_requests import Kind, light_costs
from support_plugin.prefill_loop import PrefillLoop
from tiered_kv.plugin.queue import prefill_server
from tiered_kv.plugin.queue.prefill_server import NOT_LOADED
from tiered_kv.scheduler.lifecycle import Phase
from unit.plugin.queue.test_failed_loads import fail_loads, on_host

pytestmark = pytest.mark.skipif(not on_release.IS_0_5_17, reason="refused: docs/releases.md")

GREEDY = {"ignore_eos": True}
PROMPT = Kind(family=2, seed=0, n_own=20, max_new_tokens=1, sampling=GREEDY)
LONGER = Kind(family=2, seed=0, n_own=84, max_new_tokens=1, sampling=GREEDY)
OTHER = Kind(family=1, seed=1, n_own=60, max_new_tokens=1, sampling=GREEDY)
N_REUSABLE = 28

MakeLoop = Callable[..., PrefillLoop]


@pytest.fixture
def make_prefill(args: Any, overlap: bool, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeLoop]:
    made: list[PrefillLoop] = []

    def make(**options: Any) -> PrefillLoop:
        made.append(PrefillLoop(args, monkeypatch, overlap=overlap, **options))
        made[-1].govern("fcfs", "all", light_costs())
        return made[-1]

    yield make
    for loop in made:
        loop.close()


def sent_whole(loop: PrefillLoop, req: Any) -> bool:
    n_pages = -(-len(req.origin_input_ids) // loop.page_size)
    return sum(req.disagg_kv_sender.sent) == n_pages


def test_prompts_are_computed_sent_and_kept(
    make_prefill: MakeLoop, answers: Callable[[Kind], list[int]]
) -> None:
    loop = make_prefill(chunk_tokens=16)
    kinds = [PROMPT, OTHER, LONGER]
    reqs = [kind.request(f"r{i}") for i, kind in enumerate(kinds)]
    said = loop.serve(*reqs)
    assert list(said.values()) == [answers(kind) for kind in kinds]
    assert all(sent_whole(loop, req) for req in reqs)
    assert not loop.tiered_kv_order.queue.lives
    loop.check_nothing_is_held()
    again = PROMPT.request("again")
    loop.serve(again)
    assert again.cached_tokens_device == N_REUSABLE
    on_host(loop, PROMPT)
    from_host = PROMPT.request("from host")
    assert list(loop.serve(from_host).values()) == [answers(PROMPT)]
    assert from_host.cached_tokens_host == N_REUSABLE
    loop.check_nothing_is_held()


def test_who_waits_for_a_decode_server_is_not_in_the_order_yet(make_prefill: MakeLoop) -> None:
    loop = make_prefill()
    first, second = PROMPT.request("first"), OTHER.request("second")
    loop.arrive(first)
    first.disagg_kv_sender.state = KVPoll.Bootstrapping
    loop.arrive(second)
    loop.run(lambda: not second.finished())
    lives = loop.tiered_kv_order.queue.lives
    assert len(lives) == 0
    assert not loop.waiting_queue
    first.disagg_kv_sender.state = KVPoll.WaitingForInput
    loop.run(lambda: not first.finished())
    assert sent_whole(loop, first)
    loop.run(lambda: not loop.is_at_rest)
    loop.check_nothing_is_held()


def test_a_decode_server_that_dies_takes_nothing_with_it(make_prefill: MakeLoop) -> None:
    loop = make_prefill(chunk_tokens=16)
    waits, computed = PROMPT.request("waits"), LONGER.request("computed")
    loop.arrive(waits)
    waits.disagg_kv_sender.state = KVPoll.Bootstrapping
    loop.arrive(computed)
    loop.run(lambda: len(computed.disagg_kv_sender.sent) < 2)
    for req in (waits, computed):
        req.disagg_kv_sender.abort()
    loop.run(lambda: not loop.is_at_rest)
    for req in (waits, computed):
        assert req.finished_reason.to_json()["type"] == "abort"
    loop.run(iter([True, False]).__next__)  # a tick
    assert loop.tiered_kv_order.queue.lives.phase(1) is Phase.OVER
    loop.check_nothing_is_held()
    again = LONGER.request("again")
    loop.serve(again)
    assert again.cached_tokens_device >= N_REUSABLE


def test_no_prompt_is_put_back(make_prefill: MakeLoop) -> None:
    loop = make_prefill(chunk_tokens=16)
    req = LONGER.request("long")
    loop.arrive(req)
    loop.run(lambda: loop.chunked_req is None)
    assert loop.chunked_req is req
    assert not loop.tiered_kv_order.put_back.can_put_back()
    loop.run(lambda: not loop.is_at_rest)
    loop.check_nothing_is_held()


def test_a_load_that_fails_is_computed_and_sent_once(
    make_prefill: MakeLoop, monkeypatch: pytest.MonkeyPatch, answers: Callable[[Kind], list[int]]
) -> None:
    for chunk_tokens in (None, 8):
        loop = make_prefill(chunk_tokens=chunk_tokens)
        on_host(loop, PROMPT)
        tried = fail_loads(loop, monkeypatch, 1)
        reqs = [LONGER.request("a"), OTHER.request("b")]
        said = loop.serve(*reqs)
        assert tried == [7]
        assert list(said.values()) == [answers(LONGER), answers(OTHER)]
        assert all(sent_whole(loop, req) for req in reqs)
        loop.check_nothing_is_held()
        monkeypatch.undo()


def test_whose_kv_was_sent_in_part_ends_with_an_error(
    make_prefill: MakeLoop, monkeypatch: pytest.MonkeyPatch, answers: Callable[[Kind], list[int]]
) -> None:
    """Its slots may still be read by the transfer, so it cannot begin again."""
    loop = make_prefill(chunk_tokens=32)
    on_host(loop, PROMPT)
    long, loading = OTHER.request("long"), PROMPT.request("loading")
    loop.arrive(long)
    # Its last chunk comes next. Whoever waited for long would be loaded ahead.
    loop.run(lambda: long.extend_batch_idx < 2)
    tried = fail_loads(loop, monkeypatch, 1)
    said = loop.serve(loading)
    assert tried == [7]
    assert said["loading"] == answers(PROMPT)
    loop.run(lambda: not loop.is_at_rest)
    assert long.finished_reason.to_json()["message"] == NOT_LOADED
    assert long.disagg_kv_sender.is_aborted
    loop.check_nothing_is_held()


def test_nothing_is_sent_ahead_of_a_pass_that_waits_for_loads(make_prefill: MakeLoop) -> None:
    loop = make_prefill()
    loop.serve(PROMPT.request("before"))
    loop.serve(PROMPT.request("a"))
    assert not loop.tree_cache.pass_awaits_loads
    on_host(loop, PROMPT)
    loop.serve(PROMPT.request("b"))
    assert loop.tree_cache.pass_awaits_loads


def test_a_shutdown_ends_the_loop(make_prefill: MakeLoop) -> None:
    loop = make_prefill()

    def shut_down() -> bool:
        loop.handle_shutdown(None)
        return True

    loop.script = shut_down
    prefill_server.run_loop(PrefillLoop.turn, loop)
    assert loop.gracefully_exit
