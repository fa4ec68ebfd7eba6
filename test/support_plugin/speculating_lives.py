"""Requests' lives (`support_plugin.lives`) on a loop that speculates."""

from __future__ import annotations

from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH, Req

from support_plugin.decode_requests import Kind, kinds
from support_plugin.lives import History
from tiered_kv.scheduler.plan import AdmissionPlan
from tiered_kv.scheduler.request_policy import SchedulerState

#: SGLang counts for penalties, when it speculates, the last token of each pass alone.
_PENALTIES = {"frequency_penalty", "presence_penalty", "repetition_penalty", "min_new_tokens"}


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
