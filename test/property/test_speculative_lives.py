"""Requests' lives on SGLang's own loop, of a model that verifies drafts.

Method: as in `test_recurrent_lives.py`, with SGLang's own n-gram worker and drafts of which some
are right, some in part and some not at all. Chains on pages of several tokens, trees on pages of
one.
Guarantee: every answer is what a loop that does not speculate says to the request alone; KV that is
read, and so all that became cache, is that of accepted tokens at their own places; at the end
nothing is held.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")

from sglang.srt.environ import envs
from sglang.srt.managers import scheduler
from sglang.srt.managers.io_struct import (
    AbortReq,
    ContinueGenerationReqInput,
    PauseGenerationReqInput,
)
from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH, Req

from support_plugin.decode_loop import PretendDisk, publish_arguments
from support_plugin.decode_requests import Kind, Oracle, kinds, light_costs
from support_plugin.speculating_loop import SpeculatingLoop
from tiered_kv.scheduler.plan import AdmissionPlan
from tiered_kv.scheduler.request_policy import SchedulerState, request_policies

TURNS_MAX = 4000
N_DRAFTED = 5
#: (page size, breadth of drafts, device pages, chunk, disk)
SHAPES: list[tuple[int, int, int, int | None, bool]] = [
    (4, 1, 30, 8, True),
    (1, 3, 110, 8, False),
    (4, 1, 40, None, False),
    (8, 1, 18, 16, True),
]
#: SGLang counts for penalties, when it speculates, the last token of each pass alone.
_PENALTIES = {"frequency_penalty", "presence_penalty", "repetition_penalty", "min_new_tokens"}


@pytest.fixture(scope="module")
def speculating(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    torch.compiler.set_stance("force_eager")
    yield publish_arguments(
        tmp_path_factory.mktemp("model"),
        speculative_algorithm="NGRAM",
        speculative_num_draft_tokens=N_DRAFTED,
    )
    torch.compiler.set_stance("default")


def plain_kinds() -> list[Kind]:
    """Without what SGLang itself answers otherwise when it speculates."""
    return [k for k in kinds(90) if not (k.has_grammar or _PENALTIES & set(k.sampling))]


class History:
    """What happens on a loop that may be warm from others."""

    def __init__(self, loop: SpeculatingLoop, number: int) -> None:
        self.loop, self._dice = loop, random.Random(number)
        policies = request_policies.names()
        loop.govern(policies[number % len(policies)], "all", light_costs())
        self._plan = loop.tiered_kv_order._plan
        loop.tiered_kv_order._plan = self._planned
        chosen = self._dice.sample(plain_kinds(), self._dice.randint(2, 10))
        self._coming = [(f"{number}-{i}.", kind) for i, kind in enumerate(chosen)]
        self.reqs: dict[str, tuple[Kind, Req]] = {}
        self.aborted: set[str] = set()
        self.counts: Counter[str] = Counter()
        self._turns = iter(range(TURNS_MAX))

    def _planned(self, state: SchedulerState) -> AdmissionPlan:
        plan = self._plan(state)
        assert not plan.mix_decodes
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
        hierarchy = loop.tree_cache.hierarchy
        if dice.random() < 0.1:
            hierarchy.evict_device(dice.randint(1, 40))
        if dice.random() < 0.05:
            hierarchy.context.evict_host(dice.randint(1, 20))
        if dice.random() < 0.01:
            self._fail_next_load(hierarchy.context.copier)
        return bool(self._coming) or loop._engine_paused or not loop.is_at_rest

    def _fail_next_load(self, copier: Any) -> None:
        def fail(*args: Any) -> None:
            del copier.to_device
            self.counts["failed load"] += 1
            raise OSError("on purpose")

        copier.to_device = fail

    def _abort(self, rid: str) -> None:
        self.aborted.add(rid)
        self.loop.abort_request(AbortReq(rid=rid))


def run(loop: SpeculatingLoop, oracle: Oracle, number: int) -> Counter[str]:
    history = History(loop, number)
    scheduler.TEST_RETRACT = number % 4 == 0
    rest = iter(range(3))
    try:
        with envs.SGLANG_REQ_WAITING_TIMEOUT.override(1000.0):
            loop.run(history.turn)
            loop.run(lambda: next(rest, None) is not None)
    finally:
        scheduler.TEST_RETRACT = False
        vars(loop.tree_cache.hierarchy.context.copier).pop("to_device", None)
    loop.check_nothing_is_held()
    for rid, (kind, req) in history.reqs.items():
        said, expected = list(req.output_ids_through_stop), oracle.answer(kind)
        if isinstance(req.finished_reason, FINISH_ABORT) or not req.finished():
            assert rid in history.aborted, f"history {number}: {rid} has no answer"
            said = said[: len(expected)]
            expected = expected[: len(said)]
            history.counts["aborted"] += 1
        if isinstance(req.finished_reason, FINISH_LENGTH):
            # SGLang looks for no stop in the pass that reaches the limit.
            said = said[: len(expected)]
        assert said == expected, f"history {number}, request {rid}: {kind}"
        history.counts["retracted"] += req.retraction_count
        history.counts["device"] += req.cached_tokens_device
        history.counts["host"] += req.cached_tokens_host
        history.counts["disk"] += req.cached_tokens_storage
        history.counts["verified"] += req.spec_verify_ct
        history.counts["accepted"] += req.spec_num_correct_drafts
    if number % 3 == 0:
        loop.tree_cache.reset()
        loop.token_to_kv_pool_allocator.clear()
    return history.counts


def run_all(args: Any, n_histories: int) -> None:
    totals: Counter[str] = Counter()
    for shape, (page_size, breadth, n_pages, chunk, has_disk) in enumerate(SHAPES):
        disk = PretendDisk() if has_disk else None
        loop = SpeculatingLoop(
            args,
            breadth=breadth,
            page_size=page_size,
            n_pages=n_pages,
            n_host_pages=2 * n_pages,
            chunk_tokens=chunk,
            disk=disk,
        )
        oracle = Oracle(args, overlap=False)
        try:
            for number in range(shape, n_histories, len(SHAPES)):
                totals += run(loop, oracle, number)
        finally:
            if disk is not None:
                disk.release()
            loop.close()
            oracle.close()
    print(totals)
    for what in ("aborted", "retracted", "paused", "put back", "device", "host", "disk"):
        assert totals[what] > n_histories // 20, totals
    assert totals["accepted"] > totals["verified"], totals
    assert totals["failed load"]


def test_answers_are_those_without_drafts(speculating: Any) -> None:
    run_all(speculating, 60)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_answers_are_those_without_drafts_a_thousand_times(speculating: Any) -> None:
    run_all(speculating, 1000)
