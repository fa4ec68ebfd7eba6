"""The door back into the queue, on SGLang's own scheduler: who comes through it, and as what.

Guarantee: whoever comes back is asked for on the disk again, waits anew by SGLang's clock, and is
counted as what it is; a queue that is full is left alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("sglang")

from sglang.srt.environ import envs
from sglang.srt.managers.schedule_batch import Req

from support_plugin.decode_loop import DecodeLoop, PretendDisk
from support_plugin.decode_requests import Kind, light_costs
from tiered_kv.plugin.requests.view import queued_of
from tiered_kv.scheduler.lifecycle import Phase

LONG = Kind(family=3, seed=1, n_own=30, max_new_tokens=12, sampling={"ignore_eos": True})
#: It begins like LONG.
SHORT = Kind(family=3, seed=2, n_own=5, max_new_tokens=6, sampling={"ignore_eos": True})


@pytest.fixture(params=[True, False], ids=["overlap", "no-overlap"])
def loop(args: Any, request: pytest.FixtureRequest) -> Iterator[DecodeLoop]:
    loop = DecodeLoop(args, overlap=request.param, chunk_tokens=8, disk=PretendDisk())
    loop.govern("fcfs", "round-robin", light_costs())
    yield loop
    loop.close()


@contextmanager
def no_admissions(loop: DecodeLoop, when: Callable[[], bool]) -> Iterator[None]:
    """Nobody is admitted as soon as `when`."""
    order = loop.tiered_kv_order
    offer = order._offer
    order._offer = lambda plan, state: () if when() else offer(plan, state)
    yield
    del order._offer


def put_back(loop: DecodeLoop, req: Req) -> None:
    """`req`, a long prompt, is begun and put back for another."""
    order, plan = loop.tiered_kv_order, loop.tiered_kv_order._plan
    loop.arrive(req)
    loop.run(lambda: loop.chunked_req is not req)
    loop.arrive(SHORT.request("other"))
    order._plan = lambda state: dataclasses.replace(
        plan(state), put_back_unfinished=state.can_put_back
    )
    with no_admissions(loop, lambda: req in order._everyone):
        loop.run(lambda: req not in loop.waiting_queue)
    order._plan = plan
    assert req in loop.waiting_queue


def make_way(loop: DecodeLoop, req: Req) -> None:
    """`req` runs and makes way."""
    loop.arrive(req)
    loop.run(lambda: len(req.output_ids) < 2)
    loop.tree_cache.decode_selection.leaving.add([req])
    with no_admissions(loop, lambda: True):
        loop.run(lambda: req not in loop.waiting_queue)
    assert req in loop.waiting_queue


WAYS = pytest.mark.parametrize("comes_back", [put_back, make_way])


@WAYS
def test_the_disk_is_asked_again(
    loop: DecodeLoop, comes_back: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    prefetch = loop.tree_cache.hierarchy.prefetch
    request = prefetch.request
    monkeypatch.setattr(
        prefetch, "request", lambda rid, *rest: (asked.append(rid), request(rid, *rest))
    )
    comes_back(loop, LONG.request("r"))
    assert asked.count("r") == 2


@WAYS
def test_it_waits_anew(loop: DecodeLoop, comes_back: Callable[..., None]) -> None:
    """SGLANG_REQ_WAITING_TIMEOUT would abort a request that had been running."""
    req = LONG.request("r")
    loop.arrive(req)
    req.time_stats.wait_queue_entry_time = 1.0
    loop.waiting_queue.remove(req)
    loop.tiered_kv_order.queue.drop_gone(loop.waiting_queue)
    comes_back(loop, req)
    with envs.SGLANG_REQ_WAITING_TIMEOUT.override(3600.0):
        loop.run(lambda: not loop.is_at_rest)
    assert len(req.output_ids) == 12


@WAYS
def test_it_counts_as_what_it_is(loop: DecodeLoop, comes_back: Callable[..., None]) -> None:
    loop.serve(SHORT.request("first"))
    loop.tree_cache.hierarchy.settle_copies()
    loop.tree_cache.hierarchy.evict_device(1000)
    req = LONG.request("r")
    comes_back(loop, req)
    counts = req.cached_tokens, req.cached_tokens_device, req.cached_tokens_host
    assert counts[0] == 12, "three pages are what it has in common with the first"
    assert counts[0] == counts[1] + counts[2] + req.cached_tokens_storage
    queued = queued_of(req)
    assert loop.tiered_kv_order.queue.lives.phase(queued.request_id) is Phase.WAITING
    arrived_s = queued.arrival_s
    loop.run(lambda: not loop.is_at_rest)
    assert (req.cached_tokens, req.cached_tokens_device, req.cached_tokens_host) == counts
    assert (req.retraction_count, queued.n_retractions) == (0, 0)
    assert queued.arrival_s == arrived_s
    loop.check_nothing_is_held()


def test_a_full_queue_is_left_alone(loop: DecodeLoop) -> None:
    """SGLang would abort whoever joins it."""
    req, waits = LONG.request("r"), SHORT.request("waits")
    loop.arrive(req)
    loop.run(lambda: len(req.output_ids) < 2)
    loop.max_queued_requests = 1
    loop.arrive(waits)
    loop.tree_cache.decode_selection.leaving.add([req])
    turns = iter(range(3))
    with no_admissions(loop, lambda: True):
        loop.run(lambda: next(turns, None) is not None)
    assert req in loop.running_batch.reqs
    assert not loop.tree_cache.decode_selection.leaving
    loop.run(lambda: not loop.is_at_rest)
    assert req.finished()
    assert waits.finished()
