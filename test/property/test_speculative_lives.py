"""Requests' lives on SGLang's own loop, of a model that verifies drafts.

Method: `support_plugin.lives`, with SGLang's own n-gram worker and drafts of which some
are right, some in part and some not at all. Chains on pages of several tokens, trees on pages of
one.
Guarantee: every answer is what a loop that does not speculate says to the request alone; KV that is
read, and so all that became cache, is that of accepted tokens at their own places; at the end
nothing is held.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")

from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH, Req

from support_plugin.decode_loop import PretendDisk, publish_arguments
from support_plugin.decode_requests import Kind, Oracle, kinds
from support_plugin.lives import HAPPENED, History, run
from support_plugin.speculating_loop import SpeculatingLoop
from tiered_kv.scheduler.plan import AdmissionPlan
from tiered_kv.scheduler.request_policy import SchedulerState

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


class SpeculatingHistory(History):
    """Of a loop that verifies drafts."""

    def known(self) -> list[Kind]:
        return plain_kinds()

    def said(self, req: Req, expected: list[int]) -> list[int]:
        said = list(req.output_ids_through_stop)
        is_aborted = isinstance(req.finished_reason, FINISH_ABORT) or not req.finished()
        # SGLang looks for no stop in the pass that reaches the limit.
        if is_aborted or isinstance(req.finished_reason, FINISH_LENGTH):
            said = said[: len(expected)]
        return said

    def count(self, req: Req) -> None:
        super().count(req)
        self.counts["verified"] += req.spec_verify_ct
        self.counts["accepted"] += req.spec_num_correct_drafts

    def _planned(self, state: SchedulerState) -> AdmissionPlan:
        plan = super()._planned(state)
        assert not plan.mix_decodes
        return plan


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
                totals += run(loop, oracle, disk, number, SpeculatingHistory)
        finally:
            loop.close()
            oracle.close()
    print(totals)
    for what in HAPPENED:
        assert totals[what] > n_histories // 20, totals
    assert totals["accepted"] > totals["verified"], totals
    assert totals["failed load"]


def test_answers_are_those_without_drafts(speculating: Any) -> None:
    run_all(speculating, 60)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_answers_are_those_without_drafts_a_thousand_times(speculating: Any) -> None:
    run_all(speculating, 1000)
