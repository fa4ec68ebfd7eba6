"""Whether those who run decode in the pass of a prefill: known before a policy plans.

SGLang decides it when the prefill's batch is there (managers/scheduler.py,
`_get_new_batch_prefill_raw`): not without chunked prefill, not if either batch has
log-probabilities, nor beside a prompt of embeddings. A policy that counts on decodes beside its
prefills, where there are none, would give nobody who runs another token while prompts come.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tiered_kv.core.device_spec import DeviceSpec
from tiered_kv.scheduler.plan import AdmissionPlan

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch


class Mixing:
    """Of one scheduler; `is_mixed_chunk` is its switch, as it was configured or for a pass."""

    def __init__(self, scheduler: Any, device: DeviceSpec) -> None:
        self._scheduler = scheduler
        self._is_known_to_pay = device.mixes_decodes and device.is_mixing_measured
        self._was_missed = False
        """Whether decodes were to be in the last prefill's pass, and were not, whatever the cause:
        then they have their turn before anybody counts on it again."""

    @property
    def is_wanted(self) -> bool:
        """Asked for with --enable-mixed-chunk, or known to pay on this device."""
        return bool(self._scheduler.is_mixed_chunk) or self._is_known_to_pay

    def is_possible(self, running_batch: ScheduleBatch, available_tokens: int) -> bool:
        """As far as it does not depend on who is admitted."""
        if self._scheduler.tree_cache.supports_mamba():
            # States of those who decode are looked at in passes that decode alone.
            return False
        if not self._scheduler.spec_algorithm.is_none():
            # A pass that verifies drafts is no prefill.
            return False
        if self._scheduler.require_mlp_sync:
            # Other ranks are told how many tokens this one has.
            return False
        if not running_batch.reqs:
            return True
        if self._scheduler.chunked_prefill_size is None or self._was_missed:
            return False
        if any(is_apart(req) for req in running_batch.reqs):
            return False
        needed: int = running_batch.new_tokens_required_next_decode()
        return needed < available_tokens

    def cut(self, plan: AdmissionPlan, req_of: Callable[[int], Req]) -> AdmissionPlan | None:
        """`plan`, which mixes, as far as SGLang will; None if not even its beginning can be mixed.

        Who comes behind the first that cannot waits for the next pass.
        """
        goes_on = self._scheduler.chunked_req
        if goes_on is not None and plan.put_back_unfinished:
            goes_on = None
        if goes_on is not None and is_apart(goes_on):
            return None
        order = plan.order[: plan.admit_at_most]
        for place, request_id in enumerate(order):
            if is_apart(req_of(request_id)):
                if place == 0 and goes_on is None:
                    return None
                return replace(plan, order=order[:place])
        return plan

    def set_up(self, plan: AdmissionPlan, n_running: int, unit: int) -> int:
        """Sets SGLang's switch for this pass; how many tokens of it the decodes take.

        unit: the least that a prompt is split into. A chunk that has no room for that much beside
        the decodes admits nobody.
        """
        scheduler = self._scheduler
        if plan.mix_decodes is not None:
            scheduler.is_mixed_chunk = plan.mix_decodes
        chunk_tokens = scheduler.chunked_prefill_size
        if scheduler.is_mixed_chunk and (chunk_tokens is None or chunk_tokens < n_running + unit):
            scheduler.is_mixed_chunk = False
        return n_running if scheduler.is_mixed_chunk else 0

    def make_sure(self, running_batch: ScheduleBatch | None) -> None:
        """The prefill has its memory; decodes join it only if there is a page for each that needs
        one. SGLang counts a token for each, and would stop the server if that was too little.
        """
        if running_batch is None or not self._scheduler.is_mixed_chunk or not running_batch.reqs:
            return
        if not running_batch.check_decode_mem():
            self._scheduler.is_mixed_chunk = False

    def passed(self, plan: AdmissionPlan | None, *, formed: bool, decodes: bool) -> None:
        """A pass comes next, by this plan if there was one. formed: whether it prefills."""
        if decodes:
            self._was_missed = False
        elif formed and plan is not None and plan.mix_decodes:
            self._was_missed = True


def is_apart(req: Req) -> bool:
    """Whether SGLang mixes no decodes into a pass with this request."""
    return bool(req.return_logprob) or req.input_embeds is not None
