"""Requests' lives on SGLang's own loop: what our owner believes is what SGLang does.

Method: requests arrive at random under a request policy and an iteration policy, on pools that are
too small. Chance puts prompts back, has running requests make way, evicts from device and host, has
SGLang retract; aborts requests in whatever they are doing; lets some wait too long; aborts everyone
and pauses with retraction, with requests left in the queue to go on afterwards.
Guarantee: at the start of each turn our books name those who wait in SGLang's queue, and those who
run; every answer is what plain SGLang says to the request alone, as far as it went; accounts add
up; at the end nobody is known, and nothing is held.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from typing import Any

import pytest

pytest.importorskip("sglang")

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
from tiered_kv.plugin.requests.view import queued_of
from tiered_kv.scheduler.iteration_policy import iteration_policies
from tiered_kv.scheduler.lifecycle import Phase
from tiered_kv.scheduler.plan import AdmissionPlan
from tiered_kv.scheduler.request_policy import SchedulerState, request_policies

TURNS_MAX = 4000
#: (overlap, page size, device pages, chunk, disk)
SHAPES: list[tuple[bool, int, int, int | None, bool]] = [
    (True, 4, 16, 8, True),
    (False, 4, 16, 8, False),
    (True, 4, 24, 8, False),
    (False, 1, 60, 8, True),
    (True, 8, 10, None, False),
]


class History:
    """One history on a loop that may be warm from others, governed by our policies."""

    def __init__(self, loop: DecodeLoop, dice: random.Random, number: int) -> None:
        self.loop = loop
        self._dice = dice
        policies, iterations = request_policies.names(), iteration_policies.names()
        loop.govern(
            policies[number % len(policies)],
            iterations[number // len(policies) % len(iterations)],
            light_costs(),
        )
        self.order = loop.tiered_kv_order
        self._plan = self.order._plan
        self.order._plan = self._planned
        self.counts: Counter[str] = Counter()
        chosen = dice.sample(kinds(), dice.randint(2, 10))
        self._coming = [(f"{number}-{i}.", kind) for i, kind in enumerate(chosen)]
        self.reqs: dict[str, tuple[Kind, Req]] = {}
        self.aborted: set[str] = set()
        self.first_counts: dict[str, tuple[int, ...]] = {}
        self._n_turns = 0

    def _planned(self, state: SchedulerState) -> AdmissionPlan:
        """The policy's plan, that puts back whom it would not, too."""
        plan = self._plan(state)
        if state.can_put_back and plan.order and self._dice.random() < 0.4:
            plan = dataclasses.replace(plan, put_back_unfinished=True)
        return plan

    def turn(self) -> bool:
        self._n_turns += 1
        assert self._n_turns < TURNS_MAX, "it never ends"
        dice, loop = self._dice, self.loop
        self.check()
        if loop._engine_paused:
            if dice.random() < 0.5:
                loop.continue_generation(ContinueGenerationReqInput(torch_empty_cache=False))
            return True
        if self._coming and dice.random() < 0.4:
            rid, kind = self._coming.pop()
            self.reqs[rid] = kind, kind.request(rid)
            loop.arrive(self.reqs[rid][1])
        if dice.random() < 0.05 and self.reqs:
            self._abort(dice.choice(list(self.reqs)))
        if dice.random() < 0.01:
            self.aborted |= set(self.reqs)
            loop.abort_request(AbortReq(abort_all=True))
            self.counts["all aborted"] += 1
        if dice.random() < 0.02:
            loop.pause_generation(PauseGenerationReqInput(mode="retract"))
            self.counts["paused"] += 1
        if dice.random() < 0.03 and loop.waiting_queue:
            late = dice.choice(loop.waiting_queue)
            late.time_stats.wait_queue_entry_time = 1e-6
            self.aborted.add(late.rid)
            self.counts["waited too long"] += 1
        if dice.random() < 0.08:
            self._have_some_leave()
        if dice.random() < 0.1:
            loop.tree_cache.hierarchy.evict_device(dice.randint(1, 40))
        if dice.random() < 0.05:
            loop.tree_cache.hierarchy.context.evict_host(dice.randint(1, 20))
        return bool(self._coming) or loop._engine_paused or not loop.is_at_rest

    def _abort(self, rid: str) -> None:
        self.aborted.add(rid)
        self.loop.abort_request(AbortReq(rid=rid))

    def _have_some_leave(self) -> None:
        selection = getattr(self.loop.tree_cache, "decode_selection", None)
        running = [r for r in self.loop.running_batch.reqs if not r.finished()]
        if running and selection is not None:
            selection.leaving.add(self._dice.sample(running, self._dice.randint(1, len(running))))

    # -- what holds -----------------------------------------------------------------------------

    def check(self) -> None:
        """Between two turns nothing is under way but what SGLang has in its lists."""
        loop, lives = self.loop, self.order.queue.lives
        waiting = {queued_of(req).request_id for req in loop.waiting_queue}
        for req in loop.waiting_queue:
            came_back = req.retracted_stain and not req.retraction_count
            self.counts["swapped" if req.output_ids else "put back"] += came_back
        assert set(lives.waiting.requests) == waiting
        for req in loop.running_batch.reqs:
            if not req.finished():
                phase = lives.phase(queued_of(req).request_id)
                assert phase in {Phase.RUNNING, Phase.PARKED, Phase.PREFILLING}
                self.counts[phase.name] += 1
        if loop.chunked_req is not None and not loop.chunked_req.finished():
            assert lives.phase(queued_of(loop.chunked_req).request_id) is Phase.PREFILLING
        for rid, (_, req) in self.reqs.items():
            if req.finished():
                assert lives.phase(queued_of(req).request_id) is Phase.OVER
            self._check_accounts(rid, req)

    def _check_accounts(self, rid: str, req: Req) -> None:
        tiers = req.cached_tokens_device, req.cached_tokens_host, req.cached_tokens_storage
        counts = (req.cached_tokens, *tiers)
        assert 0 <= req.cached_tokens < max(1, len(req.origin_input_ids))
        assert sum(tiers) == req.cached_tokens
        if req._cache_breakdown_computed:
            # Whatever it goes through after it was first admitted.
            assert self.first_counts.setdefault(rid, counts) == counts

    def check_end(self) -> None:
        loop, order = self.loop, self.order
        loop.check_nothing_is_held()
        assert len(order.queue.lives) == 0
        assert not order.queue._reqs
        assert not order.queue.lives.wants_time
        assert order.wait_over_bound_s() == 0
        selection = getattr(loop.tree_cache, "decode_selection", None)
        assert selection is None or not selection.running._entries
        assert selection is None or not selection.leaving
        assert order.clock.read([]) is None, "an idle server ticks"


def run(loop: DecodeLoop, oracle: Oracle, number: int) -> Counter[str]:
    history = History(loop, random.Random(number), number)
    scheduler.TEST_RETRACT = number % 4 == 0
    rest = iter(range(3))
    try:
        with envs.SGLANG_REQ_WAITING_TIMEOUT.override(1000.0):
            loop.run(history.turn)
            loop.run(lambda: next(rest, None) is not None)
    finally:
        scheduler.TEST_RETRACT = False
    history.check_end()
    for rid, (kind, req) in history.reqs.items():
        said, expected = list(req.output_ids), oracle.answer(kind)
        if isinstance(req.finished_reason, FINISH_ABORT) or not req.finished():
            assert rid in history.aborted, f"history {number}: {rid} has no answer"
            expected = expected[: len(said)]
            history.counts["aborted"] += 1
        assert said == expected, f"history {number}, request {rid}: {kind}"
        history.counts["retracted"] += req.retraction_count
    return history.counts


def run_all(args: Any, n_histories: int) -> None:
    totals: Counter[str] = Counter()
    for shape, (overlap, page_size, n_pages, chunk, has_disk) in enumerate(SHAPES):
        loop = DecodeLoop(
            args,
            overlap=overlap,
            page_size=page_size,
            n_pages=n_pages,
            n_host_pages=2 * n_pages,
            chunk_tokens=chunk,
            disk=PretendDisk() if has_disk else None,
        )
        oracle = Oracle(args, overlap=overlap)
        try:
            for number in range(shape, n_histories, len(SHAPES)):
                totals += run(loop, oracle, number)
        finally:
            loop.close()
            oracle.close()
    print(totals)
    for what in ("aborted", "retracted", "paused", "put back", "swapped", "PARKED"):
        assert totals[what] > n_histories // 20, totals


def test_the_owner_believes_what_sglang_does(args: Any) -> None:
    run_all(args, 45)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_owner_believes_what_sglang_does_ten_thousand_times(args: Any) -> None:
    run_all(args, 10_000)
