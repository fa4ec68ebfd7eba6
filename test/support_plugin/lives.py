"""What happens to requests on SGLang's own loop, whatever the model.

Requests arrive at random under every request policy, on pools that are too small. Chance puts
prompts back, evicts from device and host, has SGLang retract, aborts, pauses with retraction,
empties the cache, has the disk fail for a while, and copies to the device as well. Where prefixes
end at places (`tiers/places.py`), what these need of the host is lost at times.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from sglang.srt.environ import envs
from sglang.srt.managers import scheduler
from sglang.srt.managers.io_struct import (
    AbortReq,
    ContinueGenerationReqInput,
    PauseGenerationReqInput,
)
from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req

from support_plugin.decode_loop import DecodeLoop, PretendDisk
from support_plugin.decode_requests import Kind, Oracle, kinds, light_costs
from tiered_kv.scheduler.plan import AdmissionPlan
from tiered_kv.scheduler.request_policy import SchedulerState, request_policies

TURNS_MAX = 4000
#: What must have happened often enough in all histories.
HAPPENED = ("aborted", "retracted", "paused", "put back", "device", "host", "disk")


class History:
    """What happens on a loop that may be warm from others."""

    def __init__(self, loop: DecodeLoop, disk: PretendDisk | None, number: int) -> None:
        self.loop, self._disk, self._dice = loop, disk, random.Random(number)
        policies = request_policies.names()
        loop.govern(policies[number % len(policies)], "all", light_costs())
        self._plan = loop.tiered_kv_order._plan
        loop.tiered_kv_order._plan = self._planned
        chosen = self._dice.sample(self.known(), self._dice.randint(2, 10))
        self._coming = [(f"{number}-{i}.", kind) for i, kind in enumerate(chosen)]
        self.reqs: dict[str, tuple[Kind, Req]] = {}
        self.aborted: set[str] = set()
        self.counts: Counter[str] = Counter()
        self._turns = iter(range(TURNS_MAX))

    # -- what is another model's -------------------------------------------------------------

    def known(self) -> list[Kind]:
        """The requests that may come."""
        return kinds()

    def said(self, req: Req, expected: list[int]) -> list[int]:
        """Of what `req` has said, what is to be compared with `expected`."""
        del expected
        return list(req.output_ids)

    def count(self, req: Req) -> None:
        """`req` is over."""
        self.counts["retracted"] += req.retraction_count
        self.counts["device"] += req.cached_tokens_device
        self.counts["host"] += req.cached_tokens_host
        self.counts["disk"] += req.cached_tokens_storage

    # -- what happens ------------------------------------------------------------------------

    def _planned(self, state: SchedulerState) -> AdmissionPlan:
        plan = self._plan(state)
        if state.can_put_back and plan.order and self._dice.random() < 0.2:
            self.counts["put back"] += 1
            plan = dataclasses.replace(plan, put_back_unfinished=True)
        return plan

    def turn(self) -> bool:
        assert next(self._turns, None) is not None, "it never ends"
        dice, loop = self._dice, self.loop
        if loop._engine_paused:
            if dice.random() < 0.5:
                loop.continue_generation(ContinueGenerationReqInput(torch_empty_cache=False))
            return True
        if self._coming and dice.random() < 0.4:
            rid, kind = self._coming.pop()
            self.reqs[rid] = kind, kind.request(rid)
            loop.arrive(self.reqs[rid][1])
        if dice.random() < 0.04 and self.reqs:
            self._abort(dice.choice(list(self.reqs)))
        if dice.random() < 0.02:
            loop.pause_generation(PauseGenerationReqInput(mode="retract"))
            self.counts["paused"] += 1
        self._trouble()
        return bool(self._coming) or loop._engine_paused or not loop.is_at_rest

    def _trouble(self) -> None:
        dice, hierarchy = self._dice, self.loop.tree_cache.hierarchy
        if dice.random() < 0.1:
            hierarchy.evict_device(dice.randint(1, 40))
        if dice.random() < 0.05:
            hierarchy.context.evict_host(dice.randint(1, 20))
        places = getattr(self.loop.tree_cache, "places", None)
        if places is not None:
            self._lose_some(places.table)
        if self._disk is not None and dice.random() < 0.02:
            self._disk.reads.error = None if self._disk.reads.error else OSError("on purpose")
        if dice.random() < 0.01:
            self._fail_next_load(hierarchy.context.copier)

    def _lose_some(self, table: Any) -> None:
        if self._dice.random() < 0.05 and (slot := table.reserve()) is not None:
            table.give_back(slot)
        if self._dice.random() < 0.01:
            table.clear()

    def _fail_next_load(self, copier: Any) -> None:
        def fail(*args: Any) -> None:
            del copier.to_device
            self.counts["failed load"] += 1
            raise OSError("on purpose")

        copier.to_device = fail

    def _abort(self, rid: str) -> None:
        self.aborted.add(rid)
        self.loop.abort_request(AbortReq(rid=rid))


@contextlib.contextmanager
def surroundings(number: int) -> Iterator[None]:
    """What holds for all of a process during history `number`."""
    scheduler.TEST_RETRACT = number % 4 == 0
    try:
        with envs.SGLANG_REQ_WAITING_TIMEOUT.override(1000.0):
            yield
    finally:
        scheduler.TEST_RETRACT = False


def live(history: History, disk: PretendDisk | None) -> None:
    """All of it, to the end; then nothing is held."""
    loop = history.loop
    rest = iter(range(3))
    try:
        loop.run(history.turn)
        loop.run(lambda: next(rest, None) is not None)
    finally:
        vars(loop.tree_cache.hierarchy.context.copier).pop("to_device", None)
        if disk is not None:
            disk.release()
    loop.check_nothing_is_held()


def forget_at_times(loop: DecodeLoop, number: int) -> None:
    """What is left of history `number` is cache for the next one, but not always."""
    if number % 3 == 0:
        loop.tree_cache.reset()
        loop.token_to_kv_pool_allocator.clear()


def compare(history: History, oracle: Oracle, number: int) -> Counter[str]:
    """Every answer is that of a loop without a cache."""
    for rid, (kind, req) in history.reqs.items():
        expected = oracle.answer(kind)
        said = history.said(req, expected)
        if isinstance(req.finished_reason, FINISH_ABORT) or not req.finished():
            assert rid in history.aborted, f"history {number}: {rid} has no answer"
            expected = expected[: len(said)]
            history.counts["aborted"] += 1
        assert said == expected, f"history {number}, request {rid}: {kind}"
        history.count(req)
    return history.counts


def run_some(
    loop: DecodeLoop,
    oracle: Oracle,
    disk: PretendDisk | None,
    numbers: Iterable[int],
    history_of: type[History] = History,
) -> Counter[str]:
    """The histories of these numbers one after the other; closes `loop` and `oracle`."""
    totals: Counter[str] = Counter()
    try:
        for number in numbers:
            totals += run(loop, oracle, disk, number, history_of)
    finally:
        loop.close()
        oracle.close()
    return totals


def check_happened(totals: Counter[str], n_histories: int, *more: str) -> None:
    """All that may happen to requests, and `more`, was there often enough to show something."""
    print(totals)
    for what in (*HAPPENED, *more):
        assert totals[what] > n_histories // 20, totals
    assert totals["failed load"]


def run(
    loop: DecodeLoop,
    oracle: Oracle,
    disk: PretendDisk | None,
    number: int,
    history_of: type[History] = History,
) -> Counter[str]:
    history = history_of(loop, disk, number)
    with surroundings(number):
        live(history, disk)
    counts = compare(history, oracle, number)
    forget_at_times(loop, number)
    return counts
