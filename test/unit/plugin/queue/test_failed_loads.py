"""Copies to the device that fail under SGLang's own scheduler loop: requests are computed again."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("sglang")


from support_plugin.decode_loop import DecodeLoop
from support_plugin.decode_requests import Kind, light_costs
from tiered_kv.memory.back_off import FIRST_S

MakeLoop = Callable[..., DecodeLoop]
GREEDY = {"ignore_eos": True}
PROMPT = Kind(family=2, seed=0, n_own=20, max_new_tokens=8, sampling=GREEDY)
LONGER = Kind(family=2, seed=0, n_own=44, max_new_tokens=8, sampling=GREEDY)
OTHER = Kind(family=1, seed=1, n_own=6, max_new_tokens=30, sampling=GREEDY)
#: Of the 31 tokens of PROMPT: whole pages, and one token to be computed.
N_REUSABLE = 28


def on_host(loop: DecodeLoop, *kinds: Kind) -> None:
    """Their KV is on the host alone."""
    for i, kind in enumerate(kinds):
        loop.serve(kind.request(f"before {i}"))
    assert loop.tree_cache.hierarchy.drain()
    loop.tree_cache.hierarchy.evict_device(10_000)


def fail_loads(loop: DecodeLoop, monkeypatch: pytest.MonkeyPatch, n: int) -> list[int]:
    """The next `n` copies to the device fail; returns the pages of every copy that is tried.

    No time passes from now on but by `later`: loads that failed are tried again after a while.
    """
    progress, stopped_s = loop.tree_cache.hierarchy.progress, time.monotonic()
    monkeypatch.setattr(progress, "_clock", lambda: stopped_s)
    copier = loop.tree_cache.hierarchy.context.copier
    to_device = copier.to_device
    tried: list[int] = []

    def copy(host_pages: Any, *rest: Any) -> None:
        tried.append(len(host_pages))
        if len(tried) <= n:
            raise OSError("no such luck")
        to_device(host_pages, *rest)

    monkeypatch.setattr(copier, "to_device", copy)
    return tried


def later(loop: DecodeLoop, seconds: float) -> None:
    loop.tree_cache.hierarchy.progress._started_at -= seconds


def test_the_requests_of_a_failed_load_are_computed_again(
    make_loop: MakeLoop,
    monkeypatch: pytest.MonkeyPatch,
    answers: Callable[[Kind], list[int]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    loop = make_loop()
    on_host(loop, PROMPT)
    tried = fail_loads(loop, monkeypatch, 1)
    reqs = [PROMPT.request("a"), OTHER.request("b")]
    said = loop.serve(*reqs)
    assert list(said.values()) == [answers(PROMPT), answers(OTHER)]
    assert tried == [7]
    assert "the requests that needed them, 2, are computed again" in caplog.text
    # Nothing of it was in the cache after all.
    counted = [
        (r.cached_tokens, r.cached_tokens_device, r.cached_tokens_host, r.retraction_count)
        for r in reqs
    ]
    assert counted == [(0, 0, 0, 0), (0, 0, 0, 0)]
    loop.check_nothing_is_held()
    # It was not for ever.
    assert loop.tree_cache.hierarchy.drain()
    loop.tree_cache.hierarchy.evict_device(10_000)
    later(loop, 2 * FIRST_S)
    again = PROMPT.request("c")
    loop.serve(again)
    assert tried == [7, 7]
    assert again.cached_tokens_host == N_REUSABLE
    loop.check_nothing_is_held()


@pytest.mark.parametrize("n_decoded", range(4, 8))  # The pass may begin a page, or not.
def test_beside_requests_that_decode(
    make_loop: MakeLoop,
    monkeypatch: pytest.MonkeyPatch,
    answers: Callable[[Kind], list[int]],
    n_decoded: int,
) -> None:
    for is_mixed in (False, True):
        loop = make_loop(is_mixed=is_mixed, chunk_tokens=16)
        if is_mixed:
            loop.govern("fcfs", "all", light_costs())
        on_host(loop, PROMPT)
        tried = fail_loads(loop, monkeypatch, 1)
        decoding, loading = OTHER.request("b"), PROMPT.request("a")
        loop.arrive(decoding)
        loop.run(lambda req=decoding: len(req.output_ids) < n_decoded)  # type: ignore[misc]
        loop.serve(loading)
        loop.run(lambda loop=loop: not loop.is_at_rest)  # type: ignore[misc]
        assert tried == [7]
        assert list(loading.output_ids) == answers(PROMPT)
        assert list(decoding.output_ids) == answers(OTHER)
        loop.check_nothing_is_held()
        monkeypatch.undo()


def test_in_the_first_chunk_of_a_long_prompt(
    make_loop: MakeLoop, monkeypatch: pytest.MonkeyPatch, answers: Callable[[Kind], list[int]]
) -> None:
    loop = make_loop(chunk_tokens=8)
    on_host(loop, PROMPT)
    tried = fail_loads(loop, monkeypatch, 1)
    req = LONGER.request("a")
    loop.serve(req)
    assert tried == [7]
    assert list(req.output_ids) == answers(LONGER)
    assert req.cached_tokens == 0
    loop.check_nothing_is_held()


def test_a_device_that_takes_nothing_any_more_only_costs_time(
    make_loop: MakeLoop, monkeypatch: pytest.MonkeyPatch, answers: Callable[[Kind], list[int]]
) -> None:
    loop = make_loop()
    tried = fail_loads(loop, monkeypatch, 10_000)
    for n in range(12):
        on_host(loop, PROMPT)
        req = PROMPT.request(f"r{n}")
        loop.serve(req)
        assert list(req.output_ids) == answers(PROMPT)
        later(loop, 2.1 * FIRST_S)
    assert len(tried) == 5, "at once, and after 1, 2, 4, 8 times the first pause"
    loop.check_nothing_is_held()


def test_nobody_asks_after_passes_that_loaded_nothing(
    make_loop: MakeLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The question is a collective call."""
    loop = make_loop()

    def asked(index: int) -> bool:
        raise AssertionError("asked")

    monkeypatch.setattr(loop.tree_cache.hierarchy, "has_failed", asked)
    loop.serve(PROMPT.request("a"), OTHER.request("b"))
