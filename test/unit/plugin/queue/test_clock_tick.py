"""Rank 0's clock on every rank, carried by a broadcast that pickles as SGLang's does."""

from __future__ import annotations

import functools
import pickle
from array import array
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from sglang.srt.managers.io_struct import FlushCacheReqInput, TokenizedGenerateReqInput
from sglang.srt.managers.scheduler_components.request_receiver import SchedulerRequestReceiver
from sglang.srt.observability.req_time_stats import APIServerReqTimeStats
from sglang.srt.sampling.sampling_params import SamplingParams

from tiered_kv.plugin.queue import clock_tick
from tiered_kv.plugin.queue.clock_tick import (
    ARRIVALS_MAX,
    SharedClock,
    Tick,
    attach,
    carry_tick,
    keep_tick_with_work,
)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(clock_tick.time, "perf_counter", lambda: now[0])
    return now


class Rank:
    """A receiver with a clock; `wanted` says whether somebody waits here."""

    def __init__(self, *, wanted: bool) -> None:
        self.ticks = 0
        self.wanted = wanted
        self.clock = SharedClock(lambda: self.wanted, self._count)
        self.receiver = SimpleNamespace()
        attach(self.receiver, self.clock)

    def _count(self) -> None:
        self.ticks += 1

    def receive(self, broadcast: Callable[[Any, Any], Any], pulled: list[Any] | None) -> list[Any]:
        return carry_tick(broadcast, self.receiver, pulled)


def generate_request(rid: str, created_s: float) -> TokenizedGenerateReqInput:
    stats = APIServerReqTimeStats()
    stats.created_time = created_s
    return TokenizedGenerateReqInput(
        rid=rid,
        input_text="",
        input_ids=array("q", [1, 2]),
        input_embeds=None,
        mm_inputs=None,
        token_type_ids=[],
        sampling_params=SamplingParams(),
        return_logprob=False,
        logprob_start_len=0,
        top_logprobs_num=0,
        token_ids_logprob=None,
        stream=False,
        time_stats=stats,
    )


def two_ranks(pulled: list[Any], *, wanted: bool) -> tuple[Rank, Rank, list[Any], list[Any]]:
    first, second = Rank(wanted=wanted), Rank(wanted=not wanted)
    sent: list[bytes] = []

    def send(receiver: Any, items: list[Any]) -> list[Any]:
        sent.append(pickle.dumps(items))
        return items

    received = first.receive(send, pulled)
    other = second.receive(lambda *_: pickle.loads(sent[0]), None)
    return first, second, received, other


def test_every_rank_has_the_time_of_rank_0(now: list[float]) -> None:
    control = SimpleNamespace(what="abort")
    first, second, received, other = two_ranks([control], wanted=True)
    assert first.clock.now_s == second.clock.now_s == 1000.0
    assert (first.ticks, second.ticks) == (1, 1)
    assert received == [control]
    assert len(other) == 1


def test_an_idle_server_broadcasts_nothing_more(now: list[float]) -> None:
    first, second, received, other = two_ranks([], wanted=False)
    assert (first.ticks, second.ticks) == (0, 0)
    assert received == other == []


def test_requests_bring_the_time_of_their_arrival(now: list[float]) -> None:
    pulled = [generate_request("a", 998.5), generate_request("b", 0.0), generate_request("c", 2e3)]
    first, second, received, other = two_ranks(pulled, wanted=False)
    assert [r.rid for r in received] == [r.rid for r in other] == ["a", "b", "c"]
    for rank in (first, second):
        # Without a stamp, or with one of another clock, it is now.
        assert [rank.clock.arrival_s(rid) for rid in "abc"] == [998.5, 1000.0, 1000.0]


def test_the_time_of_creation_travels_to_the_scheduler() -> None:
    stats = APIServerReqTimeStats()
    stats.set_created_time(12.5)
    state = stats.__getstate__()
    clock_tick.send_creation_time(state, stats)
    there = APIServerReqTimeStats.__new__(APIServerReqTimeStats)
    there.__setstate__(pickle.loads(pickle.dumps(state)))
    assert there.created_time == pytest.approx(12.5, abs=1e-3)


def test_arrivals_are_kept_until_they_are_asked_for_but_not_for_ever(now: list[float]) -> None:
    clock = SharedClock(lambda: True, lambda: None)
    clock.take(Tick(1.0, {"late": 0.5}))
    clock.take(Tick(2.0, {}))
    assert clock.arrival_s("late") == 0.5
    clock.take(Tick(3.0, {"first": 2.5}))
    clock.take(Tick(4.0, {f"{i}": 3.0 for i in range(ARRIVALS_MAX)}))
    assert clock.arrival_s("first") == 4.0
    assert clock.arrival_s("0") == 3.0


def test_a_receiver_without_a_policy_of_ours_is_left_alone() -> None:
    pulled = [generate_request("a", 1.0)]
    assert carry_tick(lambda _, items: items, SimpleNamespace(), pulled) is pulled


def test_with_dp_attention_the_time_is_of_those_who_have_the_requests(now: list[float]) -> None:
    # Two groups of ranks; the first has nothing to do, and what is no request comes from it.
    split = functools.partial(
        keep_tick_with_work, SchedulerRequestReceiver._split_work_and_control_reqs
    )
    idle, busy = Rank(wanted=False), Rank(wanted=True)
    flush, theirs = FlushCacheReqInput(), generate_request("theirs", created_s=990.0)
    controls: list[list[Any]] = []

    def send(receiver: Any, items: list[Any]) -> list[Any]:
        work, control = split(receiver, items)
        controls.append(control)
        return [*work, *controls[0]]

    assert idle.receive(send, [flush]) == [flush]
    assert busy.receive(send, [theirs]) == [theirs, flush]
    assert (idle.ticks, busy.ticks) == (0, 1)
    assert busy.clock.now_s == 1000.0
    assert busy.clock.arrival_s("theirs") == 990.0
