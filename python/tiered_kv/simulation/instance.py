"""One server under the virtual clock: upstream's scheduling loop around the real policies.

What it takes over from SGLang 0.5.17 (managers/scheduler.py, schedule_batch.py): prefill before
decode, chunked prefill with one unfinished prompt at a time, the flag that stops admission until
somebody finishes, reservation by new-token ratio, and retraction when decoding runs out of memory.

Decode passes between two events are simulated in one go (`DecodeRun`), cut short at a pass's end
when an arrival or a finished transfer could start a prefill.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable

import numpy as np

from tiered_kv.scheduler.plan import PLAN_LIMIT, AdmissionPlan
from tiered_kv.scheduler.prefill_turns import PrefillTurns
from tiered_kv.scheduler.program_names import ProgramNames
from tiered_kv.scheduler.request_policy import ForecastingPolicy, SchedulerState
from tiered_kv.scheduler.waiting import WaitingQueue
from tiered_kv.simulation.admission import Added, NewTokenRatio, PrefillAdder, PrefillBatch
from tiered_kv.simulation.cache import TieredCache
from tiered_kv.simulation.decode_batch import DecodeBatch, record_gaps
from tiered_kv.simulation.decode_runs import DecodeRuns
from tiered_kv.simulation.decode_selection import selection_for
from tiered_kv.simulation.departures import Departures
from tiered_kv.simulation.events import EventQueue
from tiered_kv.simulation.execution import DecodeRun, Execution, FloatArray
from tiered_kv.simulation.held import HeldRequests
from tiered_kv.simulation.live import AnswerBlocks, LiveRequest, new_record, queued_request
from tiered_kv.simulation.policies import Policies
from tiered_kv.simulation.settings import InstanceSettings
from tiered_kv.simulation.shared_store import SharedStore
from tiered_kv.simulation.timeline import Timeline, transfer_spans
from tiered_kv.simulation.transfers import together
from tiered_kv.simulation.workload.request import Request

#: An idle server whose memory is held by transfers looks again after this many seconds.
RETRY_S = 1e-3


class Instance:
    """Takes requests with `arrive`, gives them back through `on_finish`."""

    def __init__(
        self,
        settings: InstanceSettings,
        block_tokens: int,
        events: EventQueue,
        policies: Policies,
        on_finish: Callable[[LiveRequest, float], None],
        *,
        seed: int = 0,
        timeline: Timeline | None = None,
        shared: SharedStore | None = None,
    ) -> None:
        self.settings = settings
        self.policy = policy = policies.request
        self._forecaster = policy if isinstance(policy, ForecastingPolicy) else None
        observer = together(transfer_spans(timeline), policies.believed.transferred)
        make = policies.make_manager
        self.cache = TieredCache(settings, block_tokens, events, make, observer, shared)
        self.waiting = WaitingQueue(self.cache.forest, tokens_per_unit=block_tokens)
        self._held = HeldRequests(
            self.cache, self.waiting, policy, lambda: self._wake(events.now())
        )
        self.n_iterations, self.busy_s, self.processed_prefill_tokens = 0, 0.0, 0
        self._events = events
        self._execution = Execution(settings.costs(), noise=settings.noise, seed=seed)
        self._on_finish = on_finish
        self._listener, self._timeline = policies.listener, timeline
        self._live: dict[int, LiveRequest] = {}
        self._running = batch = DecodeBatch(self.cache, is_cascade=settings.cascade)
        self._turns = turns = PrefillTurns()
        self._believed, self._names = policies.believed, ProgramNames(1)
        self._selection = selection_for(settings, batch, self._believed.costs, block_tokens, turns)
        self._unfinished: LiveRequest | None = None
        self._is_full = self._is_refused = self._is_busy = False
        self._ratio = NewTokenRatio(settings)
        self._runs = DecodeRuns(
            batch, self._selection, self.cache, self._execution, events, self._end_run
        )
        self._answers = AnswerBlocks(block_tokens)
        self.departures = Departures(
            settings, self.cache, self.waiting, batch, policy, self._answers, self._selection
        )

    @property
    def n_running(self) -> int:
        return len(self._running)

    @property
    def n_open(self) -> int:  # waiting or running
        return len(self._live)

    # -- arrivals -----------------------------------------------------------------------------

    def arrive(self, request: Request, now_s: float) -> None:
        """`request` reaches the queue. One that cannot fit is refused at once, as upstream does."""
        queued = queued_request(
            request, self.settings, self.cache, now_s, self.processed_prefill_tokens
        )
        live = LiveRequest(request, queued, new_record(request))
        tokens = request.input_tokens + request.output_tokens
        if tokens + self.settings.page_tokens >= self.cache.capacity_tokens:
            self._on_finish(live, now_s)
            return
        self._live[request.request_id] = live
        self.cache.prefetch(live)
        self.waiting.add(queued)
        self._names.arrived(queued)
        if self._listener is not None:
            self._listener.on_arrival(live, now_s)
        self.policy.on_arrival(queued, now_s)
        if self._selection is not None and self._selection.may_preempt(live):
            self._is_full = False
        self.cache.poll()
        self._held.hear()
        self._wake(now_s)

    def _wake(self, now_s: float) -> None:
        """Something could be admitted: start, or cut a run of decode passes short."""
        if not self._is_busy:
            # Not at once: whoever calls may be in the middle of an iteration's end.
            self._is_busy = True
            self._events.schedule(now_s, self._step)
        elif not self._is_full:
            self._runs.cut(now_s)

    # -- the loop -----------------------------------------------------------------------------

    def _step(self, now_s: float) -> None:
        """Start the next iteration, if there is anything to do."""
        self.cache.poll()
        self._held.hear()
        batch = self._next_prefill(now_s)
        if batch is not None:
            self._start_prefill(batch, now_s)
        elif self._running and self._make_decode_room(now_s):
            # A policy that wanted decoding first is asked again after one pass.
            self._runs.start(now_s, is_one_pass=self._is_refused)
        else:
            self._is_busy = False
            if len(self.waiting) > len(self._held):
                # Memory is held by copies under way, until whose end upstream's loop would spin.
                self._events.schedule(now_s + RETRY_S, self._wake)

    def _next_prefill(self, now_s: float) -> PrefillBatch | None:
        settings, unfinished = self.settings, self._unfinished
        self._is_refused = False
        if unfinished is None and (self._is_full or not self.waiting):
            if not self.waiting:
                self._turns.nobody_waits()
            return None
        for changed in self.waiting.changed(self.cache.take_changes()):
            self.policy.on_cached_change(changed, now_s)
        state = self._state(now_s)
        plan = self.policy.plan(state, PLAN_LIMIT)
        if settings.cache.look_again:
            for lost in self.waiting.take_lost(plan.order):
                self.cache.prefetch_again(lost)
        if self._forecaster is not None:
            self.cache.forecast(self._forecaster.forecast(state))
        if plan.put_back_unfinished and unfinished is not None:
            self.departures.put_back(unfinished, now_s)
            self._unfinished = unfinished = None
        is_mixed = settings.mixed_chunk if plan.mix_decodes is None else plan.mix_decodes
        is_mixed = is_mixed and bool(self._running)
        plan = self._limited(plan, state, is_mixed=is_mixed)
        chunk_tokens = settings.chunk_tokens
        if plan.prefill_tokens is not None:
            chunk_tokens = min(chunk_tokens, plan.prefill_tokens)
        n_mixed = self._running.n_decoding if is_mixed else 0
        if chunk_tokens <= n_mixed:
            self._is_refused = True
            return None
        running, ratio = self._running.requests, self._ratio.current
        adder = PrefillAdder(settings, self.cache, running, ratio, chunk_tokens, n_mixed)
        if unfinished is not None:
            adder.add_unfinished(unfinished, plan.unfinished_at_most)
        if adder.batch.unfinished is None or plan.unfinished_at_most is not None:
            self._admit(adder, plan, now_s)
        batch = adder.batch
        batch.is_mixed = is_mixed
        self._unfinished = batch.unfinished
        return batch if batch.chunks else None

    def _admit(self, adder: PrefillAdder, plan: AdmissionPlan, now_s: float) -> None:
        """Admit in the order of `plan`, asking the policy for more when that is used up."""
        limit, order, n_left = PLAN_LIMIT, plan.order, plan.admit_at_most
        while True:
            for request_id in order:
                if n_left == 0:
                    return
                if len(adder.batch.chunks) >= self.settings.max_running - len(self._running):
                    self._is_full = True
                    return
                live = self._live[request_id]
                self._held.wait_no_longer(request_id)
                added = adder.add(live)
                if added is Added.NO_MEMORY:
                    self._is_refused = self.departures.make_way(
                        live, adder.missing_tokens, now_s, self.processed_prefill_tokens
                    )
                    is_any = bool(adder.batch.chunks or self._running)
                    self._is_full = is_any and not self._is_refused
                    return
                if added is Added.NO_BUDGET:
                    return
                self._leave_queue(live, now_s)
                n_left = None if n_left is None else n_left - 1
                if added is Added.LAST:
                    return
            if len(order) < limit:
                return
            # All of them were admitted, and left the queue: the next plan starts after them.
            limit *= 2
            order = self.policy.plan(self._state(now_s), limit).order

    def _limited(
        self, plan: AdmissionPlan, state: SchedulerState, *, is_mixed: bool
    ) -> AdmissionPlan:
        """`plan`, as far as decodes leave room; parks who does not decode beside the prefill."""
        if self._selection is None or not self._running:
            return plan.within()
        iteration = self._selection.plan(state.now_s, state, plan.ahead, is_mixed=is_mixed)
        if is_mixed:
            self._running.choose(iteration.decode)
        return plan.within(iteration.room)

    def _leave_queue(self, live: LiveRequest, now_s: float) -> None:
        queued = live.queued
        self.waiting.remove(queued)
        self._held.left_queue(queued.request_id)
        self.policy.on_admission(queued, now_s)
        if live.record.admitted_s is None:
            live.record.admitted_s = now_s
            if self._listener is not None:
                self._listener.on_admission(live)

    def _state(self, now_s: float) -> SchedulerState:
        return SchedulerState(
            now_s=now_s,
            waiting=self.waiting,
            held=self._held.arriving,
            running=[live.queued for live in self._running.requests],
            decode_context_tokens=self._running.context_tokens + self._running.parked_tokens,
            processed_prefill_tokens=self.processed_prefill_tokens,
            chunk_tokens=self.settings.chunk_tokens,
            costs=self._believed.costs,
            available_tokens=self.cache.available_tokens,
            host_tokens=self.cache.host_units * self.cache.block_tokens,
            unfinished=None if self._unfinished is None else self._unfinished.queued,
            can_put_back=True,
            loading_bytes=self.cache.to_device.queued_bytes,
            shared_tokens_saved=self._running.shared_tokens_saved,
            turns=self._turns,
            wants_mixing=self.settings.mixed_chunk or None,
            page_tokens=self.settings.page_tokens,
        )

    # -- prefill ------------------------------------------------------------------------------

    def _start_prefill(self, batch: PrefillBatch, now_s: float) -> None:
        """Start one iteration over the chunks, and over the running requests if it is mixed."""
        for live, new, _ in batch.chunks:
            self.cache.take_private(live, new)
        if not self.cache.make_room(len(self._running) if batch.is_mixed else 0):
            # The prompt that was begun went on although memory was short.
            self._make_decode_room(now_s)
        n_decodes = self._running.n_decoding if batch.is_mixed else 0
        prefills = [(new, before) for _, new, before in batch.chunks]
        # At the start, as the server counts: who arrives meanwhile is looked at after the pass.
        self.processed_prefill_tokens += sum(new for new, _ in prefills)
        context_tokens, saved_tokens = 0, 0
        if n_decodes:
            context_tokens = self._running.context_tokens
            saved_tokens = self._running.shared_tokens_saved
        compute_s = self._execution.iteration_s(prefills, context_tokens, n_decodes, saved_tokens)
        if batch.ready_s <= now_s:
            self._believed.prefilled(prefills, compute_s, context_tokens, n_decodes, saved_tokens)
        end_s = now_s + compute_s
        if batch.ready_s > now_s:
            # Layer by layer: when the last layer's pages are there, that layer is left to compute.
            last_layer_s = compute_s / self.settings.model.n_layers
            end_s = max(end_s, batch.ready_s + last_layer_s)
        self._events.schedule(end_s, lambda at_s: self._end_prefill(batch, now_s, at_s, n_decodes))

    def _end_prefill(
        self, batch: PrefillBatch, start_s: float, now_s: float, n_decodes: int
    ) -> None:
        n_new = sum(new for _, new, _ in batch.chunks)
        self._count(start_s, now_s, 1, "prefill", new_tokens=n_new, decodes=n_decodes)
        self._turns.passed(now_s, now_s - start_s, decoded=bool(n_decodes))
        if n_decodes:
            self._end_decodes(np.array([now_s]))
        for live, new, before in batch.chunks:
            queued = live.queued
            queued.prefilled_tokens = before + new
            self.cache.commit(live, queued.tokens, queued.prefilled_tokens)
            if live is not batch.unfinished:
                self._first_token(live, now_s)
        self._step(now_s)

    def _first_token(self, live: LiveRequest, now_s: float) -> None:
        """The prompt is computed, which gives a token (after a retraction: one more)."""
        queued = live.queued
        queued.output_tokens += 1
        if queued.first_token_s is None:
            queued.first_token_s = live.record.first_token_s = now_s
        live.last_token_s = now_s
        live.token_times_s.append(array("d", [now_s]))
        if queued.output_tokens >= live.request.output_tokens:
            self._finish(live, now_s)
            self._is_full = False
            return
        self._running.add(live)
        if self._selection is not None:
            self._selection.joined(live)

    # -- decode -------------------------------------------------------------------------------

    def _end_run(self, run: DecodeRun, now_s: float) -> None:
        n_steps = len(run.ends_s)
        self._count(run.start_s, now_s, n_steps, "decode", decodes=self._running.n_decoding)
        self._turns.passed(now_s, now_s - run.start_s, decoded=True, n=n_steps)
        batch = self._running
        n, saved = batch.n_decoding, batch.shared_tokens_saved
        self._believed.decoded(run.ends_s, run.start_s, batch.context_tokens, n, saved)
        self._ratio.decay(n_steps)
        self._end_decodes(run.ends_s)
        self._step(now_s)

    def _end_decodes(self, ends_s: FloatArray) -> None:
        """Every running request got one token at each of `ends_s`."""
        finished = self._running.advance(ends_s)
        for live in finished:
            self.departures.leave_batch(live)
            self._finish(live, float(ends_s[-1]))
        if finished:
            self._is_full = False

    def _make_decode_room(self, now_s: float) -> bool:
        """Memory for one more token of each running request; retracts if need be.

        False if nobody is left running.
        """
        if self.cache.make_room(len(self._running)):
            return True
        order = self.departures.order(now_s)
        while len(order) > (1 if self._unfinished is None else 0):
            self.departures.leave(order.pop(0), now_s, self.processed_prefill_tokens)
            if self.cache.make_room(len(self._running)):
                break
        self._ratio.after_retraction(self._running.requests)
        self._is_full = False
        if order and not self.cache.make_room(len(self._running)):
            if self.settings.swap and self.cache.to_host.queued_bytes:
                # What was swapped out is on its way, and its pages are free when it is written.
                return False
            (live,) = order
            self.departures.leave_batch(live)
            self._give_up(live, now_s)
        return bool(self._running)

    # -- the end of a request -----------------------------------------------------------------

    def _finish(self, live: LiveRequest, now_s: float) -> None:
        queued, record = live.queued, live.record
        queued.last_token_s = record.finish_s = now_s
        record.n_retractions, record.n_swaps = queued.n_retractions, live.n_swaps
        record_gaps(live)
        self.cache.commit(live, self._answers.blocks(live), queued.prefilled_tokens)
        self._names.ended(queued, live.pinned)
        if self._listener is not None:
            self._listener.on_finish(live, self.cache.forest, now_s)
        self.cache.release(live)
        self.policy.on_finish(queued, now_s)
        del self._live[queued.request_id]
        self._on_finish(live, now_s)

    def _give_up(self, live: LiveRequest, now_s: float) -> None:
        """Abort: it does not fit even alone."""
        self.cache.release(live)
        self.policy.on_abort(live.queued, now_s)
        del self._live[live.queued.request_id]
        self._on_finish(live, now_s)

    def _count(self, start_s: float, end_s: float, n_steps: int, name: str, **args: float) -> None:
        self.n_iterations += n_steps
        self.busy_s += end_s - start_s
        timeline = self._timeline
        if timeline is None:
            return
        timeline.span("forward", name, start_s, end_s, steps=n_steps, **args)
        queues = {"waiting": float(len(self.waiting)), "running": float(len(self._running))}
        timeline.counters("requests", end_s, queues)
        timeline.counters("cached tokens", end_s, self.cache.resident_tokens())
