"""Has one of our policies order SGLang's waiting queue, and say how much is prefilled at once.

SGLang admits from the front of its queue until something does not fit (managers/scheduler.py,
`_get_new_batch_prefill_raw`). For that one call the queue is cut to what the policy's plan offers,
in its order; afterwards it is whole again, in the order of arrival, for all else that reads it.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tiered_kv.memory.stored_pages import prompt_of
from tiered_kv.plugin.queue import again, clock_tick
from tiered_kv.plugin.queue.foretold import Foretold
from tiered_kv.plugin.queue.mixing import Mixing
from tiered_kv.plugin.queue.put_back import PutBack
from tiered_kv.plugin.queue.queued import QueuedRequests
from tiered_kv.plugin.queue.whole_queue import show_whole_queue
from tiered_kv.plugin.requests.salts import root_key
from tiered_kv.plugin.requests.view import QUEUED, is_aborted, queued_of, terms_of
from tiered_kv.plugin.upstream.current import cache_contract, request_kv
from tiered_kv.scheduler.cost_model import CostModel
from tiered_kv.scheduler.decode_room import DecodeRoom
from tiered_kv.scheduler.plan import PLAN_LIMIT, AdmissionPlan
from tiered_kv.scheduler.prefill_turns import PrefillTurns
from tiered_kv.scheduler.request import QueuedRequest
from tiered_kv.scheduler.request_policy import RequestPolicy, SchedulerState
from tiered_kv.scheduler.session_prompts import SessionPrompt, SessionPrompts

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

    from tiered_kv.forest.node import Node
    from tiered_kv.plugin.cache.metrics_adapter import MetricsRecorder
    from tiered_kv.plugin.cache.residency_log import ResidencyLog
    from tiered_kv.tiers.hierarchy import KVHierarchy


class PrefillSkipped(Exception):  # noqa: N818 - no error: a way out of SGLang's function
    """The plan wants no prefill in this iteration."""


class RequestOrder:
    """One policy over the queue of one scheduler."""

    def __init__(
        self,
        scheduler: Any,
        policy: RequestPolicy,
        hierarchy: KVHierarchy,
        costs: CostModel,
        residency: ResidencyLog,
        metrics: MetricsRecorder,
        max_wait_s: float | None = None,
    ) -> None:
        """`max_wait_s`: how long the policy promises that nobody waits, None: it does not."""
        self.clock = clock_tick.SharedClock(
            wanted=lambda: self.queue.lives.wants_time, on_tick=self._on_tick
        )
        self.queue = QueuedRequests(hierarchy, policy, residency, metrics, self.clock)
        self.foretold = Foretold(hierarchy, policy)
        self.sessions = SessionPrompts()
        self.clock.also_wanted(lambda: self.foretold.is_due(time.perf_counter()))
        self.room: DecodeRoom[ScheduleBatch] | None = None
        """Set if an iteration policy chooses who decodes: it knows what room that leaves."""
        self.turns = PrefillTurns()
        """Told of passes by `room`, if there is one, which sees more of them."""
        self._launched: tuple[float, bool] | None = None
        """When the last pass was, and whether it decoded; None: there was none."""
        self.put_back = PutBack(scheduler)
        self._mixing = Mixing(scheduler, costs.device)
        self._scheduler = scheduler
        self.policy = policy
        self._hierarchy = hierarchy
        self.costs = costs
        self._max_wait_s = max_wait_s
        self._may_put_back = True
        # While SGLang forms a prefill batch.
        self._running_batch: ScheduleBatch | None = None
        self._everyone: list[Req] | None = None
        self._state: SchedulerState | None = None
        self._planned: AdmissionPlan | None = None
        self._first: Req | None = None
        """Whom nobody may pass in this pass."""
        self._is_blocked = False
        show_whole_queue(scheduler, lambda: self._everyone)

    def _on_tick(self) -> None:
        self.queue.drop_gone(self._scheduler.waiting_queue)
        self.queue.tell()
        self.foretold.tick(self.clock.now_s)

    def wait_over_bound_s(self) -> float:
        """By how much the bound on waiting is exceeded now, at most; 0 if it is kept."""
        return self.queue.wait_over_bound_s(self._max_wait_s)

    def add(self, req: Req, add: Callable[[], None]) -> None:
        """`add`, SGLang's `_add_request_to_queue`, for `req`, which is new or comes back."""
        scheduler = self._scheduler
        if hasattr(req, QUEUED) and again.is_to_end(scheduler, req):
            again.end_now(scheduler, req)
            self.queue.refused(req)
            return
        add()
        queue = scheduler.waiting_queue
        if queue and queue[-1] is req:
            is_new = not hasattr(req, QUEUED)
            self.queue.arrived(req)
            if is_new:
                self.foretold.arrived(req, self.clock.now_s)
        else:
            self.queue.refused(req)

    # -- what the cache sees (plugin/cache/observer.py) -----------------------------------------

    def first_token(self, req: Req) -> None:
        """`req` has a token, and goes on."""
        self.queue.first_token(req)

    def released(self, req: Req, last: Node) -> None:
        """`req` holds no KV any more; what it computed is in the tree down to `last`."""
        self.queue.released(req)
        if req.finished() and not is_aborted(req):
            self.queue.ended(req, last)
            self._remember(req, last)
            self.foretold.ended(req, last, self.clock.now_s)

    def _remember(self, req: Req, last: Node) -> None:
        """What a session that its caller names has had, for administrators to name it by."""
        session = terms_of(req).hints.session_id
        if session is not None and not last.is_root:
            _, tokens = prompt_of(last, array("q"))
            prompt = SessionPrompt(root_key(req.extra_key), tokens)
            self.sessions.ended(session, terms_of(req).tenant, prompt)

    def emptied(self) -> None:
        """Nothing is cached any more."""
        self.queue.look_up_all()

    # -- one prefill batch --------------------------------------------------------------------

    def form_prefill(self, form: Callable[[], Any], running_batch: ScheduleBatch) -> Any:
        """`form`, SGLang's `_get_new_batch_prefill_raw`, with the queue in the policy's order.

        Returns what `form` does: the batch, if there is one, and `running_batch` as it goes on.
        """
        scheduler = self._scheduler
        configured = scheduler.chunked_prefill_size, scheduler.is_mixed_chunk
        self._end_last_pass()
        self._running_batch = running_batch
        if cache_contract.POLLED_BEFORE_PREFILL:
            self.polled()
        batch = None
        try:
            batch, running_batch = form()
        except PrefillSkipped:
            pass
        finally:
            scheduler.chunked_prefill_size, scheduler.is_mixed_chunk = configured
            self._end_pass(batch)
        if batch is None and self.put_back.undo():
            # Nobody fits without the prompt that was begun, so it goes on, in this very pass.
            self._may_put_back = False
            try:
                return self.form_prefill(form, running_batch)
            finally:
                self._may_put_back = True
        self.put_back.after_result()
        self.queue.has_news |= batch is not None and cache_contract.FULL_UNTIL_SOMEBODY_LEAVES
        decodes = bool(running_batch.reqs) if batch is None else bool(batch.decoding_reqs)
        if batch is not None or decodes:
            self._launched = self.clock.now_s, decodes
        self._mixing.passed(self._planned, formed=batch is not None, decodes=decodes)
        return batch, running_batch

    def _end_last_pass(self) -> None:
        """What was launched after the last prefill was formed, or instead, is over."""
        if self._launched is not None and self.room is None:
            launched_s, decoded = self._launched
            now_s = self.clock.now_s
            self.turns.passed(now_s, now_s - launched_s, decoded=decoded)
        self._launched = None

    def polled(self) -> None:
        """Transfers were acknowledged: before `form` looks whether it may stop.

        It stops if the batch was full and nobody has left it since. But who has joined the queue
        since, or has its pages by now, may fit, and may be more urgent than whoever did not.
        """
        queue = self.queue
        queue.drop_gone(self._scheduler.waiting_queue)
        if self.room is not None and self._running_batch is not None:
            self.room.begin_pass(self._running_batch)
        queue.hold_or_let_go()
        if queue.has_news and self._running_batch is not None:
            self._running_batch.batch_is_full = False

    def put_in_order(self, waiting_queue: list[Req], running_batch: ScheduleBatch) -> None:
        """In the place of `SchedulePolicy.calc_priority`. Raises PrefillSkipped."""
        queue, scheduler = self.queue, self._scheduler
        queue.has_news = False
        queue.look_up_changed()
        state = self._state = self._look(running_batch)
        plan = self._plan(state)
        queue.fetch_again(plan.order)
        if plan.put_back_unfinished and state.can_put_back:
            self.put_back.take_out()
        plan = self._planned = self._limited(plan, state)
        self._everyone = waiting_queue.copy()
        offered = self._offer(plan, state)
        for request_id in offered:
            queue.wait_no_longer(request_id)
        waiting_queue[:] = [queue.req(request_id) for request_id in offered]
        # If nothing runs that could make way, waiting for it would be in vain.
        is_held_up = plan.first_or_none and bool(state.running or scheduler.chunked_req)
        self._first = waiting_queue[0] if is_held_up and waiting_queue else None
        self._set_chunk(plan, state)

    def may_start(self, req: Req, can_start: Callable[[], bool]) -> bool:
        """Whether `req`, offered in its turn, is admitted as far as its adapter is concerned.

        SGLang goes on with the next in its queue if not; but not past whom nobody may pass.
        """
        if not self._is_blocked and can_start():
            return True
        self._is_blocked = self._is_blocked or req is self._first
        return False

    def _end_pass(self, batch: ScheduleBatch | None) -> None:
        """Make the queue whole again, without those who are in `batch`."""
        self._running_batch = self._first = None
        self._is_blocked = False
        everyone, state = self._everyone, self._state
        self._everyone = self._state = None
        if everyone is None or state is None:
            return
        admitted: set[Req] = set()
        if batch is not None:
            n_mixed = len(batch.decoding_reqs or ())
            self.queue.processed_prefill_tokens += batch.extend_num_tokens - n_mixed
            admitted = self.queue.admitted(batch.reqs)
            self.foretold.admitted(map(queued_of, admitted))
        waiting = [req for req in everyone if req not in admitted] if admitted else everyone
        self._scheduler.waiting_queue = waiting
        if batch is not None and batch.prefill_stats is not None:
            # It was counted over what was offered.
            batch.prefill_stats.num_pending_tokens = self._pending_tokens()
        self.foretold.planned(state)

    def _pending_tokens(self) -> int:
        """As `SchedulerLoadInquirer._get_num_pending_tokens` counts them."""
        scheduler = self._scheduler
        done = 0 if (req := scheduler.chunked_req) is None else request_kv.extend_tokens(req)
        return int(scheduler.load_inquirer._get_num_pending_tokens(chunk_deduct=done))

    def able(self) -> Iterator[Req]:
        """Those who wait and could start now if there were room, in the order of arrival."""
        queue = self.queue
        return (queue.req(i) for i in queue.waiting.requests if i not in queue.held)

    # -- the plan -----------------------------------------------------------------------------

    def _look(self, running_batch: ScheduleBatch) -> SchedulerState:
        scheduler, context = self._scheduler, self._hierarchy.context
        running = self.queue.running(running_batch.reqs)
        loading_pages = self._hierarchy.load_back.queue.pages_in_flight
        context_tokens = sum(r.prompt_tokens + r.output_tokens for r in running)
        available_tokens = context.allocator.available() + scheduler.tree_cache.evictable_size()
        return SchedulerState(
            now_s=self.clock.now_s,
            waiting=self.queue.waiting,
            held=self.queue.held,
            running=running,
            decode_context_tokens=context_tokens,
            processed_prefill_tokens=self.queue.processed_prefill_tokens,
            chunk_tokens=self._most_tokens(),
            costs=self.costs,
            available_tokens=available_tokens,
            host_tokens=context.host.n_pages * context.forest.page_size,
            unfinished=self._unfinished(),
            can_put_back=self._may_put_back and self.put_back.can_put_back(),
            loading_bytes=loading_pages * context.copier.page_format.page_bytes,
            shared_tokens_saved=min(context_tokens, scheduler.tree_cache.saved_tokens),
            turns=self.turns,
            can_mix=self._mixing.is_possible(running_batch, available_tokens),
            wants_mixing=self._mixing.is_wanted,
            page_tokens=scheduler.page_size,
        )

    def _unfinished(self) -> QueuedRequest | None:
        if (req := self._scheduler.chunked_req) is None:
            return None
        queued = queued_of(req)
        queued.prefilled_tokens = request_kv.prefix_tokens(req)
        return queued

    def _most_tokens(self) -> int:
        """Most prefill tokens of one batch, as configured."""
        chunk_tokens: int | None = self._scheduler.chunked_prefill_size
        most: int = self._scheduler.max_prefill_tokens
        return most if chunk_tokens is None else min(most, chunk_tokens)

    def _plan(self, state: SchedulerState) -> AdmissionPlan:
        """As much of the order as one batch can take; a plan that mixes is one that SGLang will."""
        plan = self._head(state)
        if not (plan.mix_decodes and state.running):
            return plan
        if state.can_mix and (cut := self._mixing.cut(plan, self.queue.req)) is not None:
            return cut
        if state.can_mix:
            state.can_mix = False
            plan = self._head(state)
        return replace(plan, mix_decodes=False) if plan.mix_decodes else plan

    def _head(self, state: SchedulerState) -> AdmissionPlan:
        limit, waiting = PLAN_LIMIT, self.queue.waiting
        while True:
            plan = self.policy.plan(state, limit)
            order = plan.order
            if len(order) < limit or limit >= len(waiting):
                return plan
            if plan.admit_at_most is not None and plan.admit_at_most <= len(order):
                return plan
            if sum(waiting.get(i).uncached_tokens for i in order) >= state.chunk_tokens:
                return plan
            limit *= 2

    def _offer(self, plan: AdmissionPlan, state: SchedulerState) -> tuple[int, ...]:
        order = plan.order[: plan.admit_at_most]
        goes_on = state.unfinished is not None and not plan.put_back_unfinished
        if not order and not state.running and not goes_on and not plan.waits_for_gangs:
            # Nothing runs that a request could wait for: a policy that is too careful would hang.
            return tuple(request.request_id for request in state.candidates()[:1])
        return order

    def _limited(self, plan: AdmissionPlan, state: SchedulerState) -> AdmissionPlan:
        """`plan`, as far as those who decode leave room.

        It counts on everybody decoding, as they do beside a prefill. Where an iteration policy
        chooses them, what these leave room for counts instead.
        """
        room, running_batch = self.room, self._running_batch
        is_mixed = plan.mix_decodes
        if is_mixed is None:
            is_mixed = self._scheduler.is_mixed_chunk
        if room is None or running_batch is None or not state.running or is_mixed:
            return plan.within()
        return plan.within(room.plan_prefill(running_batch, state, plan.ahead).room)

    def _set_chunk(self, plan: AdmissionPlan, state: SchedulerState) -> None:
        """The most tokens of this batch: whole pages, one at least, as configured at most.

        Where attention splits prompts at fixed places (`truncation_align_size`) it is whole pieces
        of that size instead: SGLang begins no prompt whose first piece is less. Where decodes are
        mixed in, they take theirs first. Raises PrefillSkipped if there is no time for any, or no
        memory, and somebody decodes meanwhile.
        """
        scheduler, n_running = self._scheduler, len(state.running)
        prefill_tokens = plan.prefill_tokens
        chunk_tokens: int | None = scheduler.chunked_prefill_size
        unit: int = scheduler.truncation_align_size or scheduler.page_size
        taken = self._mixing.set_up(plan, n_running, unit)
        available_tokens = state.available_tokens
        if scheduler.chunked_req is not None and n_running and available_tokens is not None:
            # SGLang goes on with a prompt that was begun whatever memory says, and would stop if
            # there was none. A decode ends somebody, or has somebody make way.
            limit = available_tokens // unit * unit + taken
            prefill_tokens = limit if prefill_tokens is None else min(prefill_tokens, limit)
        if prefill_tokens is None:
            return
        if n_running and prefill_tokens <= taken:
            raise PrefillSkipped
        if chunk_tokens is not None:
            units = max(1, (prefill_tokens - taken) // unit)
            scheduler.chunked_prefill_size = min(chunk_tokens, units * unit + taken)

    def before_mixing(self) -> None:
        """The prefill has its memory."""
        self._mixing.make_sure(self._running_batch)
