"""SGLang's requests as a scheduling policy sees them, from their arrival to their last token.

What SGLang does with a request is reported to the owner of its life (scheduler/lifecycle.py), in
the order in which SGLang does it. Nothing is done per token: a request is touched when it arrives,
when what is cached of it changes, when it is admitted, at its first token and when it leaves or is
over. What is known of running requests is brought up to date when a policy is about to look at it.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from tiered_kv.api.terms import Terms
from tiered_kv.core.ids import Tier
from tiered_kv.forest.key import TOKEN_TYPECODE
from tiered_kv.memory.read_order import Urgency
from tiered_kv.plugin.requests.inputs import as_named
from tiered_kv.plugin.requests.salts import root_key
from tiered_kv.plugin.requests.view import (
    QUEUED,
    is_aborted,
    is_named,
    is_probe,
    queued_of,
    report_of,
    terms_of,
)
from tiered_kv.scheduler.lifecycle import Event, RequestLives
from tiered_kv.scheduler.program_names import ProgramNames, program_of
from tiered_kv.scheduler.request import QueuedRequest
from tiered_kv.scheduler.request_policy import Arriving, RequestPolicy
from tiered_kv.scheduler.waiting import WaitingQueue

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from tiered_kv.forest.node import Node
    from tiered_kv.plugin.cache.metrics_adapter import MetricsRecorder
    from tiered_kv.plugin.cache.residency_log import ResidencyLog
    from tiered_kv.plugin.queue.clock_tick import SharedClock
    from tiered_kv.tiers.hierarchy import KVHierarchy

_NO_TOKENS = array(TOKEN_TYPECODE)


class QueuedRequests:
    """Keeps the owner of requests' lives in step with SGLang's scheduler."""

    def __init__(
        self,
        hierarchy: KVHierarchy,
        policy: RequestPolicy,
        residency: ResidencyLog,
        metrics: MetricsRecorder,
        clock: SharedClock,
    ) -> None:
        forest = hierarchy.context.forest
        self.names = ProgramNames(forest.page_size)
        self.lives = RequestLives(WaitingQueue(forest), policy, self.names)
        self.has_news = False
        """Somebody joined the queue, or may start now, since this was last set to False."""
        self.processed_prefill_tokens = 0
        self._hierarchy = hierarchy
        self._residency = residency
        self._metrics = metrics
        self._clock = clock
        self._reqs: dict[int, Req] = {}
        """Those who wait, by id."""
        self._ids: dict[str, int] = {}
        """The same the other way round."""
        self._next_id = 0
        hierarchy.prefetch.urgency_of = self._urgency_of

    @property
    def waiting(self) -> WaitingQueue:
        return self.lives.waiting

    @property
    def held(self) -> Mapping[int, Arriving]:
        """Those whose pages are on their way, by id."""
        return self.lives.held

    # -- joining the queue --------------------------------------------------------------------

    def arrived(self, req: Req) -> None:
        """`req` was put into SGLang's waiting queue, for the first time or again."""
        queued: QueuedRequest | None = getattr(req, QUEUED, None)
        if queued is None:
            queued = self._make(req)
            setattr(req, QUEUED, queued)
        # Only memory that ran out counts as a retraction, as in SGLang's answers.
        queued.n_retractions = req.retraction_count
        queued.output_tokens = len(req.output_ids)
        if queued.tokens and queued.output_tokens:
            queued.tokens = self._named(req)
        queued.processed_at_arrival = self.processed_prefill_tokens
        self._residency.is_wanted = True
        self._reqs[queued.request_id] = req
        self._ids[req.rid] = queued.request_id
        self.lives.queue(queued, self._clock.now_s)
        self._hold_or_let_go(req.rid)
        self.has_news = True

    def refused(self, req: Req) -> None:
        """SGLang ended `req` instead of putting it into its queue."""
        queued: QueuedRequest | None = getattr(req, QUEUED, None)
        if queued is not None:
            self.lives.abort(queued, self._clock.now_s)

    def _make(self, req: Req) -> QueuedRequest:
        terms = Terms() if is_probe(req) else terms_of(req)
        hints, tenant = terms.hints, terms.tenant
        self._next_id += 1
        return QueuedRequest(
            request_id=self._next_id,
            arrival_s=self._clock.arrival_s(req.rid),
            root=self._hierarchy.root(root_key(req.extra_key)),
            tokens=self._named(req) if is_named(req) else _NO_TOKENS,
            prompt_tokens=len(req.origin_input_ids),
            max_new_tokens=req.sampling_params.max_new_tokens,
            slo=terms.slo,
            priority=req.priority or 0 if hints.priority is None else hints.priority,
            tenant=tenant,
            expected_output_tokens=hints.expected_output_tokens,
            program=program_of(tenant, hints.session_id),
            parent_program=program_of(tenant, hints.parent_session_id),
            branches=hints.branches,
            is_last_call=hints.session_final,
            tool=hints.tool or "",
        )

    def _named(self, req: Req) -> array[int]:
        """The tokens that it has until now, as they name pages."""
        tokens = req.origin_input_ids
        if req.output_ids:
            tokens = tokens + req.output_ids
        return as_named(tokens, req.extra_key, self._hierarchy.context)

    # -- while they wait ----------------------------------------------------------------------

    def req(self, request_id: int) -> Req:
        """SGLang's request of that id, which waits."""
        return self._reqs[request_id]

    def drop_gone(self, waiting_queue: Sequence[Req]) -> None:
        """Forget those who are not in SGLang's queue any more: aborted, or timed out.

        Arrivals are told by a hook, so equal lengths mean that nobody is missing.
        """
        if len(waiting_queue) == len(self._reqs):
            return
        there = {queued_of(req).request_id for req in waiting_queue}
        for request_id in [i for i in self._reqs if i not in there]:
            self.lives.abort(queued_of(self._reqs[request_id]), self._clock.now_s)
            self._left_queue(request_id)

    def _left_queue(self, request_id: int) -> None:
        req = self._reqs.pop(request_id)
        if self._ids.get(req.rid) == request_id:
            del self._ids[req.rid]
        if not self._reqs:
            self._residency.is_wanted = False
            self._residency.take()

    def hold_or_let_go(self) -> None:
        """Pages have come, or are on their way now: who waits for some, and who may start?"""
        for rid in self._hierarchy.prefetch.take_news():
            self._hold_or_let_go(rid)

    def _hold_or_let_go(self, rid: str) -> None:
        prefetch, request_id = self._hierarchy.prefetch, self._ids.get(rid)
        if request_id is None:
            return
        if not prefetch.done(rid):
            seconds, tokens = prefetch.arriving(rid)
            self.lives.hold(request_id, Arriving(self._clock.now_s + seconds, tokens))
        elif self.lives.let_go(request_id):
            self.has_news = True

    def wait_no_longer(self, request_id: int) -> None:
        """It is to run without the pages that have not come."""
        if self.lives.let_go(request_id):
            self._hierarchy.prefetch.give_up(self._reqs[request_id].rid)

    def _urgency_of(self, rid: str) -> Urgency | None:
        """Of one who waits; None if it is not known, or not yet."""
        request_id = self._ids.get(rid)
        return None if request_id is None else self.lives.urgency(request_id)

    def look_up_changed(self) -> None:
        """Bring what is cached of those who wait up to date."""
        self.lives.cached_changed(self._residency.take(), self._clock.now_s)

    def fetch_again(self, request_ids: Iterable[int]) -> None:
        """Of whoever of these has lost what was cached of it, a store may have it."""
        for queued in self.waiting.take_lost(request_ids):
            rid = self._reqs[queued.request_id].rid
            self._hierarchy.prefetch.request_again(rid, queued.root, queued.tokens)

    def look_up_all(self) -> None:
        """The trees were emptied: nothing is cached of anybody."""
        self._residency.take()
        root = self._hierarchy.root
        roots = {i: root(root_key(req.extra_key)) for i, req in self._reqs.items()}
        self.lives.moved(roots, self._clock.now_s)

    def wait_over_bound_s(self, bound_s: float | None) -> float:
        """By how much somebody's wait is beyond its bound, at most; 0 if nobody's is.

        bound_s: of those whose class has no bound of its own; None: there is none.
        """
        over_s = 0.0
        for queued in self.waiting:
            own_s = queued.slo.max_wait_s
            limit_s = bound_s if own_s is None else own_s
            if limit_s is not None:
                over_s = max(over_s, self._clock.now_s - queued.arrival_s - limit_s)
        return over_s

    # -- while they run -----------------------------------------------------------------------

    def admitted(self, reqs: Iterable[Req]) -> set[Req]:
        """Those of `reqs` who waited until now run from now on; returns them."""
        admitted, now_s = set(), self._clock.now_s
        for req in reqs:
            queued = queued_of(req)
            is_first = queued.admitted_s is None
            if not self.lives.admit(queued, now_s):
                continue
            self._left_queue(queued.request_id)
            admitted.add(req)
            if is_first:
                if not is_probe(req):
                    self._metrics.admitted(queued, now_s)
                forest = self._hierarchy.context.forest
                _credit_source(req, forest.take_ahead(req.last_node, Tier.DEVICE))
                if (report := report_of(req)) is not None:
                    report.wait_s = now_s - queued.arrival_s
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

    def parked(self, reqs: Iterable[Req]) -> None:
        """`reqs` run, but skip this iteration."""
        self.lives.park(queued_of(req).request_id for req in reqs)

    def first_token(self, req: Req) -> None:
        """`req` has a token, the first one since it was admitted."""
        queued: QueuedRequest | None = getattr(req, QUEUED, None)
        if queued is None or not req.output_ids:
            return
        queued.output_tokens = len(req.output_ids)
        if self.lives.token(queued) and (report := report_of(req)) is not None:
            # Its answer may leave before the next tick. Rank 0 answers, on its own clock.
            report.ttft_s = time.perf_counter() - queued.arrival_s

    def released(self, req: Req) -> None:
        """`req` holds no KV any more: it has ended, or goes somewhere that is still to be seen."""
        queued: QueuedRequest | None = getattr(req, QUEUED, None)
        if queued is None:
            return
        self.first_token(req)
        # With speculative decoding a pass may say more than was wanted.
        queued.output_tokens = len(req.output_ids_through_stop)
        if not req.finished():
            self.lives.leave(queued)
        elif is_aborted(req):
            self.lives.abort(queued, self._clock.now_s)
        else:
            self.lives.answer(queued, self._clock.now_s)

    def ended(self, req: Req, last: Node) -> None:
        """`req` has its answer, and what it computed is in the tree down to `last`."""
        queued: QueuedRequest | None = getattr(req, QUEUED, None)
        if queued is not None:
            self.names.ended(queued, last)

    # -- time ---------------------------------------------------------------------------------

    def tell(self) -> None:
        """A tick: what happened since the last one has happened now, and nothing is under way."""
        self.lives.settle(self._clock.now_s)
        for event, queued in self.lives.date(self._clock.now_s):
            if event is Event.TOKEN:
                self._metrics.first_token(queued)
            else:
                self._metrics.answered(queued)


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
