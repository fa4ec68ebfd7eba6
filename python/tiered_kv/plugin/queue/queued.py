"""SGLang's requests as a scheduling policy sees them, from their arrival to their last token.

Nothing is done per token: a request is touched when it arrives, when what is cached of it changes,
when it is admitted, at its first token and when it is over. What is known of running requests is
brought up to date when a policy is about to look at it.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX

from tiered_kv.api.report import RequestReport
from tiered_kv.api.terms import Terms
from tiered_kv.core.ids import Tier
from tiered_kv.forest.key import TOKEN_TYPECODE
from tiered_kv.plugin.cache.prefix_cache import is_named_by_tokens
from tiered_kv.scheduler.request import QueuedRequest
from tiered_kv.scheduler.request_policy import RequestPolicy
from tiered_kv.scheduler.waiting import WaitingQueue

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from tiered_kv.plugin.cache.metrics_adapter import MetricsRecorder
    from tiered_kv.plugin.cache.residency_log import ResidencyLog
    from tiered_kv.plugin.queue.clock_tick import SharedClock
    from tiered_kv.tiers.hierarchy import KVHierarchy

#: The attribute of SGLang's request under which ours is kept.
QUEUED = "tiered_kv_queued"
_NO_TERMS = Terms()
_NO_TOKENS = array(TOKEN_TYPECODE)


@dataclass(slots=True)
class _Ended:
    queued: QueuedRequest
    is_answered: bool


class QueuedRequests:
    """Keeps a `WaitingQueue` and its policy in step with SGLang's scheduler."""

    def __init__(
        self,
        hierarchy: KVHierarchy,
        policy: RequestPolicy,
        residency: ResidencyLog,
        metrics: MetricsRecorder,
    ) -> None:
        self.waiting = WaitingQueue(hierarchy.context.forest)
        self.held: set[int] = set()
        """Ids of those whose pages are on their way."""
        self.has_news = False
        """Somebody joined the queue, or may start now, since this was last set to False."""
        self.processed_prefill_tokens = 0
        self._hierarchy = hierarchy
        self._policy = policy
        self._residency = residency
        self._metrics = metrics
        self._reqs: dict[int, Req] = {}
        self._begun: set[int] = set()
        """Ids of those who were admitted once, whether they run, or wait again."""
        self._next_id = 0
        # What a policy hears of with the next tick: only then all ranks know the time.
        self._started: list[QueuedRequest] = []
        self._ended: list[_Ended] = []

    # -- joining the queue --------------------------------------------------------------------

    def arrived(self, req: Req, clock: SharedClock) -> None:
        """`req` was put into SGLang's waiting queue, for the first time or again."""
        queued: QueuedRequest | None = getattr(req, QUEUED, None)
        if queued is None:
            queued = self._make(req, clock)
            setattr(req, QUEUED, queued)
        else:
            queued.n_retractions += 1
        self._join(req, queued, clock)

    def parked(self, req: Req, clock: SharedClock) -> None:
        """`req`, whose prompt was begun, made way for others and is in the queue again."""
        self._join(req, queued_of(req), clock)

    def _join(self, req: Req, queued: QueuedRequest, clock: SharedClock) -> None:
        queued.prefilled_tokens = 0
        queued.output_tokens = len(req.output_ids)
        if queued.tokens and queued.output_tokens:
            queued.tokens = req.origin_input_ids + req.output_ids
        queued.queued_s = clock.now_s
        queued.processed_at_arrival = self.processed_prefill_tokens
        self._residency.is_wanted = True
        self._reqs[queued.request_id] = req
        self.waiting.add(queued)
        self._policy.on_arrival(queued, clock.now_s)
        if not self._hierarchy.prefetch.done(req.rid):
            self.held.add(queued.request_id)
        self.has_news = True

    def _make(self, req: Req, clock: SharedClock) -> QueuedRequest:
        terms: Terms = getattr(req, "tiered_kv_terms", _NO_TERMS)
        if req.rid.startswith(HEALTH_CHECK_RID_PREFIX):
            terms = _NO_TERMS  # nobody was promised anything
        self._next_id += 1
        return QueuedRequest(
            request_id=self._next_id,
            arrival_s=clock.arrival_s(req.rid),
            root=self._hierarchy.root(req.extra_key),
            tokens=req.origin_input_ids if is_named_by_tokens(req) else _NO_TOKENS,
            prompt_tokens=len(req.origin_input_ids),
            max_new_tokens=req.sampling_params.max_new_tokens,
            slo=terms.slo,
            priority=req.priority or 0,
            tenant=terms.tenant,
            expected_output_tokens=terms.hints.expected_output_tokens,
        )

    # -- while they wait ----------------------------------------------------------------------

    def req(self, request_id: int) -> Req:
        """SGLang's request of that id, which waits."""
        return self._reqs[request_id]

    def drop_gone(self, waiting_queue: Sequence[Req], now_s: float) -> None:
        """Forget those who are not in SGLang's queue any more: aborted, or timed out.

        Arrivals are told by a hook, so equal lengths mean that nobody is missing.
        """
        if len(waiting_queue) == len(self._reqs):
            return
        there = {queued_of(req).request_id for req in waiting_queue}
        for request_id in [i for i in self._reqs if i not in there]:
            queued = self.waiting.get(request_id)
            self._leave(queued)
            self._begun.discard(request_id)
            self._policy.on_abort(queued, now_s)

    def release_ready(self) -> None:
        """Those whose pages have arrived, or who need not wait for them longer, may start."""
        for request_id in [i for i in self.held if self._is_ready(i)]:
            self.held.discard(request_id)
            # Pages that did not come are on its path still.
            self._residency.note(self.waiting.get(request_id).path)
            self.has_news = True

    def _is_ready(self, request_id: int) -> bool:
        return self._hierarchy.prefetch.done(self._reqs[request_id].rid)

    def look_up_changed(self, now_s: float) -> None:
        """Bring what is cached of those who wait up to date."""
        for queued in self.waiting.changed(self._residency.take()):
            self._policy.on_cached_change(queued, now_s)

    def look_up_all(self) -> None:
        """The trees were emptied: nothing is cached of anybody."""
        self._residency.take()
        for queued in list(self.waiting):
            self.waiting.remove(queued)
            queued.root = self._hierarchy.root(self._reqs[queued.request_id].extra_key)
            self.waiting.add(queued)

    def _leave(self, queued: QueuedRequest) -> None:
        self.waiting.remove(queued)
        self.held.discard(queued.request_id)
        del self._reqs[queued.request_id]
        if not self._reqs:
            self._residency.is_wanted = False
            self._residency.take()

    def wait_over_bound_s(self, now_s: float, bound_s: float | None) -> float:
        """By how much somebody's wait is beyond its bound, at most; 0 if nobody's is.

        bound_s: of those whose class has no bound of its own; None: there is none.
        """
        over_s = 0.0
        for queued in self.waiting:
            own_s = queued.slo.max_wait_s
            limit_s = bound_s if own_s is None else own_s
            if limit_s is not None:
                over_s = max(over_s, now_s - queued.arrival_s - limit_s)
        return over_s

    # -- while they run -----------------------------------------------------------------------

    def admitted(self, reqs: Iterable[Req], now_s: float) -> set[Req]:
        """Those of `reqs` who waited until now run from now on; returns them."""
        admitted = set()
        for req in reqs:
            queued = queued_of(req)
            if queued.request_id not in self._reqs:
                continue
            self._leave(queued)
            self._policy.on_admission(queued, now_s)
            if queued.request_id not in self._begun:
                self._begun.add(queued.request_id)
                self._metrics.admitted(queued, now_s)
                forest = self._hierarchy.context.forest
                _credit_source(req, forest.take_ahead(req.last_node, Tier.DEVICE))
                if (report := report_of(req)) is not None:
                    report.wait_s = now_s - queued.arrival_s
            admitted.add(req)
        return admitted

    def running(self, reqs: Iterable[Req]) -> list[QueuedRequest]:
        """Those who decode, as they are now."""
        running = []
        for req in reqs:
            if req.finished():
                continue
            queued = queued_of(req)
            queued.output_tokens = len(req.output_ids)
            queued.prefilled_tokens = queued.prompt_tokens + queued.output_tokens - 1
            running.append(queued)
        return running

    def first_token(self, req: Req) -> None:
        """`req` has a token, and goes on."""
        queued: QueuedRequest | None = getattr(req, QUEUED, None)
        if queued is not None and queued.first_token_s is None and req.output_ids:
            queued.output_tokens = len(req.output_ids)
            self._started.append(queued)
            if (report := report_of(req)) is not None:
                # Its answer may leave before the next tick. Rank 0 answers, on its own clock.
                report.ttft_s = time.perf_counter() - queued.arrival_s

    def ended(self, req: Req) -> None:
        """`req` gave up its KV: it is finished, was aborted, or will wait again."""
        queued: QueuedRequest | None = getattr(req, QUEUED, None)
        # Out of memory, SGLang aborts the last request without finishing it.
        if queued is None or not (req.finished() or req.to_finish is not None):
            return
        self.first_token(req)
        queued.output_tokens = len(req.output_ids)
        self._ended.append(_Ended(queued, not is_aborted(req)))

    # -- time ---------------------------------------------------------------------------------

    @property
    def wants_time(self) -> bool:
        return bool(self._reqs or self._started or self._ended)

    def tell(self, now_s: float) -> None:
        """A tick: what happened since the last one has happened now."""
        for queued in self._started:
            if queued.first_token_s is None:
                queued.first_token_s = queued.last_token_s = now_s
                self._metrics.first_token(queued)
        self._started.clear()
        for ended in self._ended:
            queued = ended.queued
            queued.last_token_s = now_s
            self._begun.discard(queued.request_id)
            if ended.is_answered:
                self._policy.on_finish(queued, now_s)
                self._metrics.answered(queued)
            else:
                self._policy.on_abort(queued, now_s)
        self._ended.clear()


def _credit_source(req: Req, n_tokens: int) -> None:
    """`n_tokens` of its device hit came from host or disk while it waited: that is what counts.

    SGLang has counted where they were when it was admitted (managers/schedule_batch.py:
    prepare_for_extend).
    """
    n_tokens = min(n_tokens, req.cached_tokens_device)
    from_disk = min(n_tokens, max(0, req.storage_hit_length - req.cached_tokens_storage))
    req.cached_tokens_device -= n_tokens
    req.cached_tokens_storage += from_disk
    req.cached_tokens_host += n_tokens - from_disk


def queued_of(req: Req) -> QueuedRequest:
    queued: QueuedRequest = getattr(req, QUEUED)
    return queued


def report_of(req: Req) -> RequestReport | None:
    report: RequestReport | None = getattr(req, "tiered_kv_report", None)
    return report


def is_aborted(req: Req) -> bool:
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    return isinstance(req.finished_reason or req.to_finish, FINISH_ABORT)
