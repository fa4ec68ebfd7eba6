"""Random parking, making way, coming back and aborting, on SGLang's own loop and batches.

Method: requests of all kinds arrive at random; in every turn of the loop chance decides who of the
running decodes, who makes way, who is aborted, what is evicted. The pools are so small that SGLang
retracts requests as well, and in every fourth history its own switch for testing has it retract one
now and then. Guarantee: every answer is the one that plain SGLang gives to the request
alone (of an aborted one, its beginning), and afterwards no slot, pin or page is missing.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

pytest.importorskip("sglang")

from sglang.srt.managers import scheduler
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req

from support_plugin.decode_loop import DecodeLoop
from support_plugin.decode_requests import Kind, Oracle, kinds, light_costs
from tiered_kv.scheduler.iteration_policy import IterationPlan, IterationState, RunningTotals

TURNS_MAX = 3000
#: (overlap, page size, device pages, chunk, decodes mixed into prefills): the smallest pools just
#: hold the longest request.
SHAPES: list[tuple[bool, int, int, int | None, bool]] = [
    (True, 4, 14, None, False),
    (False, 4, 14, None, False),
    (True, 1, 50, 8, False),
    (False, 1, 50, 8, False),
    (True, 8, 9, 16, False),
    (True, 4, 30, 8, True),
    (False, 4, 64, 8, True),
]


class Dice:
    """An iteration policy by chance; whoever must decode does."""

    def __init__(self, dice: random.Random) -> None:
        self._dice = dice

    def fits(self, totals: RunningTotals, costs: Any, now_s: float) -> bool:
        return self._dice.random() < 0.2

    def plan(self, state: IterationState) -> IterationPlan:
        dice, running = self._dice, state.running
        if state.short_tokens:
            able = [r.request_id for r in running if r.can_park and r.can_swap]
            n = dice.randint(0, min(len(able), len(running) - 1))
            return IterationPlan(swap_out=tuple(dice.sample(able, n)))
        if dice.random() < 0.2:
            return IterationPlan()
        chosen = dice.sample([r.request_id for r in running], dice.randint(1, len(running)))
        chosen += [r.request_id for r in running if not r.can_park and r.request_id not in chosen]
        return IterationPlan(tuple(chosen))


class History:
    """One random history on a loop that may be warm from others."""

    def __init__(self, loop: DecodeLoop, dice: random.Random, number: int) -> None:
        self._loop = loop
        self._dice = dice
        self.selection = loop.choose_by(Dice(dice))
        chosen = dice.sample(kinds(), dice.randint(2, 10))
        self._coming = [(f"{number}-{i}.", kind) for i, kind in enumerate(chosen)]
        self.reqs: dict[str, tuple[Kind, Req]] = {}
        self.aborted: set[str] = set()
        self._n_turns = 0

    def turn(self) -> bool:
        self._n_turns += 1
        assert self._n_turns < TURNS_MAX, "it never ends"
        dice, loop = self._dice, self._loop
        if self._coming and dice.random() < 0.5:
            rid, kind = self._coming.pop()
            req = kind.request(rid)
            self.reqs[rid] = kind, req
            loop.arrive(req)
        if dice.random() < 0.1:
            self._have_some_leave()
        if dice.random() < 0.03 and self.reqs:
            rid = dice.choice(list(self.reqs))
            self.aborted.add(rid)
            loop.abort_request(AbortReq(rid=rid))
        if dice.random() < 0.1:
            loop.tree_cache.hierarchy.evict_device(dice.randint(1, 40))
        return bool(self._coming) or not loop.is_at_rest

    def _have_some_leave(self) -> None:
        running = [r for r in self._loop.running_batch.reqs if not r.finished()]
        if running:
            n = self._dice.randint(1, len(running))
            self.selection.leaving.add(self._dice.sample(running, n))


def run(loop: DecodeLoop, oracle: Oracle, number: int) -> Counter[str]:
    """One history, checked; what happened in it."""
    history = History(loop, random.Random(number), number)
    scheduler.TEST_RETRACT = number % 4 == 0
    try:
        loop.run(history.turn)
    finally:
        scheduler.TEST_RETRACT = False
    loop.check_nothing_is_held()
    n_aborted = 0
    for rid, (kind, req) in history.reqs.items():
        said, expected = list(req.output_ids), oracle.answer(kind)
        if isinstance(req.finished_reason, FINISH_ABORT) or not req.finished():
            assert rid in history.aborted
            n_aborted += 1
            expected = expected[: len(said)]
        assert said == expected, f"history {number}, request {rid}: {kind}"
    return Counter(
        {
            "aborted": n_aborted,
            "swapped": history.selection.leaving.n_swapped,
            "retracted": sum(req.retraction_count for _, req in history.reqs.values()),
            "parked": history.selection.n_parts,
        }
    )


def run_all(args: Any, n_histories: int) -> None:
    totals: Counter[str] = Counter()
    for shape, (overlap, page_size, n_pages, chunk, is_mixed) in enumerate(SHAPES):
        loop = DecodeLoop(
            args,
            overlap=overlap,
            page_size=page_size,
            n_pages=n_pages,
            n_host_pages=2 * n_pages,
            chunk_tokens=chunk,
            is_mixed=is_mixed,
        )
        if is_mixed:
            # SGLang by itself counts a token, not a page, for each decode that it mixes in, and
            # stops where a prompt that was begun finds no page. Our order sees to both.
            loop.govern("fcfs", "all", light_costs())
        oracle = Oracle(args, overlap=overlap)
        try:
            for number in range(shape, n_histories, len(SHAPES)):
                totals += run(loop, oracle, number)
        finally:
            loop.close()
            oracle.close()
    # They did happen.
    for what in ("aborted", "swapped", "retracted", "parked"):
        assert totals[what] > n_histories // 20, totals


def test_answers_are_those_of_plain_sglang(args: Any) -> None:
    run_all(args, 140)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_answers_are_those_of_plain_sglang_ten_thousand_times(args: Any) -> None:
    run_all(args, 10_000)


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "no-overlap"])
@pytest.mark.parametrize("policy", ["slack", "round-robin"])
def test_our_own_policies_in_charge(args: Any, policy: str, overlap: bool) -> None:
    """The queue's policy, its clock and the choice of who decodes, as a server wires them."""
    costs = light_costs()
    oracle = Oracle(args, overlap=overlap)
    n_parked = 0
    for number in range(6):
        loop = DecodeLoop(args, overlap=overlap, n_pages=50, n_host_pages=60, chunk_tokens=16)
        loop.govern("slack", policy, costs)
        dice = random.Random(number)
        coming = [(f"{number}-{i}.", kind) for i, kind in enumerate(dice.sample(kinds(), 12))]
        asked: list[tuple[Kind, Req]] = []
        turns = iter(range(TURNS_MAX))

        def goes_on(
            loop: DecodeLoop = loop, dice: random.Random = dice, coming: Any = coming,
            asked: Any = asked, turns: Any = turns,
        ) -> bool:  # fmt: skip
            assert next(turns, None) is not None, "it never ends"
            if coming and dice.random() < 0.4:
                rid, kind = coming.pop()
                asked.append((kind, kind.request(rid)))
                loop.arrive(asked[-1][1])
            return bool(coming) or not loop.is_at_rest

        loop.run(goes_on)
        loop.check_nothing_is_held()
        for kind, req in asked:
            assert list(req.output_ids) == oracle.answer(kind), f"{number}: {kind}"
        n_parked += loop.tree_cache.decode_selection.n_parts
        loop.close()
    oracle.close()
    assert n_parked > 0
