"""Has an iteration policy say which of the running requests decode now, and who makes way.

SGLang's running batch stays whole; for one iteration a part of it runs (`decode_batch.py`). Who is
not in the part is parked: it keeps its KV and its place, and gets no token. Where memory is short,
somebody leaves the batch with its KV (`swap_out.py`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from tiered_kv.plugin.attention.cascade import planner_of
from tiered_kv.plugin.decode.batch import decode_part
from tiered_kv.plugin.decode.running import RunningRequests
from tiered_kv.plugin.decode.swap_out import Leaving
from tiered_kv.plugin.options import decode as decode_option
from tiered_kv.plugin.requests.view import queued_of, terms_of
from tiered_kv.plugin.upstream.current import request_kv
from tiered_kv.scheduler.iteration_policy import (
    IterationPlan,
    IterationPolicy,
    IterationState,
    iteration_policies,
)
from tiered_kv.scheduler.prefill_turns import PrefillTurns
from tiered_kv.scheduler.waiting import QUEUE_LOOK

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

    from tiered_kv.plugin.queue.clock_tick import SharedClock
    from tiered_kv.scheduler.cost_model import CostModel
    from tiered_kv.scheduler.prompts_ahead import PromptsAhead
    from tiered_kv.scheduler.request_policy import SchedulerState

logger = logging.getLogger(__name__)

#: A prefill that seems to have taken so many times what it should was followed by idleness.
PREFILL_LATE = 3.0
#: In one of so many iterations the observed passes are learned from, if no transfer has led to it.
LEARN_EVERY = 32


class DecodeSelection:
    """One policy over the running batch of one scheduler."""

    def __init__(
        self,
        scheduler: Any,
        policy: IterationPolicy,
        costs: CostModel,
        clock: SharedClock,
        *,
        turns: PrefillTurns | None = None,
        is_cascade: bool = False,
        on_parked: Callable[[Sequence[Req]], None] | None = None,
    ) -> None:
        """turns: those that the order of the queue is asked with, which are told of passes here.

        on_parked: told who skips an iteration, and of nobody when all take part again."""
        cache = scheduler.tree_cache
        self.running = RunningRequests((lambda: cache.saved_tokens) if is_cascade else None)
        self.leaving = Leaving(scheduler)
        self.n_parts = 0
        """Iterations in which somebody was parked."""
        # The pass launched last: whether it decoded, when, and how long it should take at most.
        self._turns = PrefillTurns() if turns is None else turns
        self._launched: tuple[bool, float, float] | None = None
        # Who would be admitted next, and whether the queue's policy sees no room for anybody.
        self._first_in_queue: Req | None = None
        self._sees_no_room = False
        self._n_updates = 0
        self._scheduler = scheduler
        self._policy = policy
        self._costs = costs
        self._clock = clock
        self._on_parked = on_parked
        self._are_some_parked = False
        # While SGLang prepares a decode: the running batch, and who of it decodes (None: all; [] if
        # all are about to leave).
        self._whole: ScheduleBatch | None = None
        self._chosen: Sequence[Req] | None = None
        # The running batch, and what runs in its place, if anything.
        self._part: tuple[ScheduleBatch, ScheduleBatch | None] | None = None

    # -- one decode ---------------------------------------------------------------------------

    def update(self, batch: ScheduleBatch, update: Callable[[], Any]) -> Any:
        """`update`, SGLang's `update_running_batch`, for a part of `batch` if the policy says so.

        Returns what `update` does: the running batch, whole.
        """
        self._part = None
        self._learn()
        self.leaving.settle(batch)
        self._whole = batch
        try:
            return update()
        finally:
            self._whole = self._chosen = None

    def fits_in_memory(self, batch: ScheduleBatch, check: Callable[..., bool]) -> bool:
        """In the place of `check_decode_mem`: whether those who decode find room.

        SGLang asks after it has dropped from `batch` who is finished, before it makes room.
        """
        if batch is not self._whole:
            return check()
        self._choose(batch)
        if self._chosen is None:
            return check()
        return not self._chosen or check(selected_indices=self._rows(batch))

    def prepare(self, batch: ScheduleBatch, prepare: Callable[[], None]) -> None:
        """In the place of `prepare_for_decode`."""
        now_s, whole = self._clock.now_s, self._whole
        if whole is None or batch is not whole:
            prepare()
            if whole is None:
                # Mixed into a prefill, all of them.
                self.running.some_decode(batch.reqs, now_s)
                self._park(())
            return
        if self._chosen is not None and not self._chosen:
            self.running.some_decode([], now_s)
            self._part = batch, None
            return
        rows = None if self._chosen is None else self._rows(batch)
        if rows is None or len(rows) == len(batch.reqs):
            prepare()
            self.running.everyone_decodes(now_s)
            self._park(())
            return
        part = decode_part(batch, rows)
        self.running.some_decode(part.reqs, now_s)
        self._part = batch, part
        self.n_parts += 1
        decoding = set(part.reqs)
        self._park([req for req in batch.reqs if req not in decoding])
        batch.tree_cache.parts.metrics.some_parked()

    def _park(self, reqs: Sequence[Req]) -> None:
        if reqs or self._are_some_parked:
            self._are_some_parked = bool(reqs)
            if self._on_parked is not None:
                self._on_parked(reqs)

    def batch_to_run(self, batch: ScheduleBatch | None) -> ScheduleBatch | None:
        """`batch`, or what runs in its place."""
        if self._part is not None and batch is self._part[0]:
            batch, self._part = self._part[1], None
        self._note_launch(batch)
        return batch

    def _note_launch(self, batch: ScheduleBatch | None) -> None:
        self._end_last_pass()
        if batch is None:
            return
        mode, most_s = batch.forward_mode, math.inf
        decodes = mode.is_decode() or mode.is_mixed()
        if not decodes:
            chunks = tuple(zip(batch.extend_lens, batch.prefix_lens, strict=True))
            most_s = PREFILL_LATE * self._costs.iteration_s(chunks, 0, 0)
        self._launched = decodes, self._clock.now_s, most_s

    def _end_last_pass(self) -> None:
        """The pass launched last is over, as far as can be known when the next one is planned.

        But one that prefilled may have been followed by nothing, and idling is no prefill.
        """
        if self._launched is not None:
            decoded, launched_s, most_s = self._launched
            now_s = self._clock.now_s
            self._turns.passed(now_s, min(now_s - launched_s, most_s), decoded=decoded)
            self._launched = None

    def after_result(self) -> None:
        """A result was processed, in an iteration that may be no decode."""
        self.running.take_tokens(self._clock.now_s)

    def _learn(self) -> None:
        """Have the cost model keep up with the decodes, which the tiers alone do not need."""
        self._n_updates += 1
        if self._n_updates % LEARN_EVERY == 0:
            # Every rank comes here in the same iterations, as it must.
            self._scheduler.tree_cache.hierarchy.learn()

    # -- who decodes --------------------------------------------------------------------------

    def _choose(self, batch: ScheduleBatch) -> None:
        """Ask the policy who of `batch` decodes, and who leaves for one who finds no room."""
        running, now_s = self.running, self._clock.now_s
        running.keep_up(batch.reqs, now_s)
        self._end_last_pass()
        self._chosen = None
        try:
            self._choose_of(batch)
        finally:
            self._turns.decided()

    def _choose_of(self, batch: ScheduleBatch) -> None:
        running, now_s = self.running, self._clock.now_s
        if self._first_in_queue is not None and (batch.batch_is_full or self._sees_no_room):
            self._make_way(batch, self._first_in_queue)
        if not self.leaving and self._policy.fits(running.totals, self._costs, now_s):
            return
        staying = [req for req in batch.reqs if req not in self.leaving]
        if not staying:
            # They leave when their last results are there: nothing may be launched until then.
            self._chosen = []
            return
        plan = self._plan(staying)
        if plan.decode is not None:
            self._chosen = [running.req(request_id) for request_id in plan.decode]
        elif len(staying) < len(batch.reqs):
            self._chosen = staying

    def begin_pass(self, batch: ScheduleBatch) -> None:
        """A scheduling pass begins, in which those in `batch` run; perhaps nobody."""
        self._end_last_pass()
        if not self._scheduler.waiting_queue and self._scheduler.chunked_req is None:
            self._turns.nobody_waits()
        if batch.is_empty() and self.running.totals.n:
            self.running.clear()
            self.leaving.clear()
            self._first_in_queue = None
            self._park(())

    def plan_prefill(
        self, batch: ScheduleBatch, prefill: SchedulerState, ahead: PromptsAhead | None
    ) -> IterationPlan:
        """What room the decodes of `batch` leave for a prefill that runs before them.

        prefill: what the order of the queue was asked with. ahead: see `IterationState.ahead`.
        """
        reqs = batch.reqs
        if any(req.finished() for req in reqs):
            # SGLang drops them only when it prepares the decode.
            reqs = [req for req in reqs if not req.finished()]
        self.running.keep_up(reqs, self._clock.now_s)
        self._end_last_pass()
        self._turns.wants_prefill()
        state = self._state(reqs)
        state.prefill, state.ahead = prefill, ahead
        plan = self._policy.plan(state)
        self._turns.planned(is_hurried=plan.is_hurried)
        return plan

    def _plan(
        self, reqs: Sequence[Req], short_tokens: int = 0, short_for_tbt_s: float | None = None
    ) -> IterationPlan:
        state = self._state(reqs)
        state.short_tokens, state.short_for_tbt_s = short_tokens, short_for_tbt_s
        return self._policy.plan(state)

    def _state(self, reqs: Sequence[Req]) -> IterationState:
        return IterationState(
            now_s=self._clock.now_s,
            running=self.running.look(reqs),
            costs=self._costs,
            is_cascade=self.running.is_cascade,
            prefill_load=self._turns.load(),
            is_hurried=self._turns.is_hurried,
        )

    def _rows(self, batch: ScheduleBatch) -> list[int]:
        """Of those chosen who are in `batch` still; all of it if none is."""
        everyone = range(len(batch.reqs))
        if self._chosen is None:
            return list(everyone)
        chosen = set(self._chosen)
        return [row for row in everyone if batch.reqs[row] in chosen] or list(everyone)

    # -- who makes way ------------------------------------------------------------------------

    def queue_in_order(self, offered: Sequence[Req], able: Iterable[Req]) -> None:
        """SGLang admits from `offered` next. If that is nobody, the queue's policy sees no room for
        anybody: then whoever waits with the tightest token objective may need others to make way.

        able: those who wait and could start if there were room, in the order of arrival.
        """
        self._sees_no_room = not offered
        self._first_in_queue = offered[0] if offered else None
        if not offered:
            hurried = [r for r in islice(able, QUEUE_LOOK) if terms_of(r).slo.tbt_s is not None]
            self._first_in_queue = min(
                hurried,
                key=lambda req: (terms_of(req).slo.tbt_s, queued_of(req).request_id),
                default=None,
            )

    def _make_way(self, batch: ScheduleBatch, first: Req) -> None:
        """Have some leave so that `first`, whose objective is tighter, is admitted."""
        self._first_in_queue = None  # asked for once: the queue is put in order again
        if self.leaving or first.finished() or request_kv.holds_kv(first):
            return
        tbt_s = terms_of(first).slo.tbt_s
        if tbt_s is None or not self.running.is_any_looser(tbt_s):
            return
        missing = self._missing_tokens(batch, first)
        for req in batch.reqs:
            self.running.measure(req)
        plan = self._plan(batch.reqs, missing, tbt_s)
        self.leaving.add(self.running.req(request_id) for request_id in plan.swap_out)

    def _missing_tokens(self, batch: ScheduleBatch, first: Req) -> int:
        """KV tokens that the device lacks for `first`, as SGLang counts them; at least 1.

        See `PrefillAdder` in managers/schedule_policy.py. One, if a place in the batch is missing.
        """
        from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS

        def to_produce(req: Req) -> int:
            left: int = req.sampling_params.max_new_tokens - len(req.output_ids)
            return min(left, CLIP_MAX_NEW_TOKENS)

        scheduler = self._scheduler
        page_size: int = scheduler.page_size
        free = (
            scheduler.token_to_kv_pool_allocator.available_size()
            + scheduler.tree_cache.evictable_size()
        )
        reserved = sum(map(to_produce, batch.reqs)) * scheduler.new_token_ratio_tracker.current
        new = len(first.origin_input_ids) + len(first.output_ids) - request_kv.prefix_tokens(first)
        needed = new + to_produce(first) + page_size
        return max(1, math.ceil(needed + reserved - free))

    def make_room(
        self,
        batch: ScheduleBatch,
        release: Callable[[int, int], object],
        retract: Callable[[], tuple[list[Req], float, list[Req]]],
    ) -> tuple[list[Req], float, list[Req]]:
        """In the place of `retract_decode`: those who run lack memory for their next tokens.

        Who goes is the policy's choice, as far as it has one, then SGLang's. Returns what
        `retract_decode` does: who was retracted, the new token ratio, who was aborted. release:
        SGLang's `release_req`, of a row and how many stay.
        """
        from sglang.srt.managers.scheduler_components.new_token_ratio_tracker import (
            NewTokenRatioTracker,
        )

        victims = self._victims(batch)
        if not victims:
            return retract()
        gone = set(victims)
        keep = [row for row, req in enumerate(batch.reqs) if req not in gone]
        for row, req in enumerate(batch.reqs):
            if req in gone:
                release(row, len(keep))
        batch.filter_batch(keep_indices=keep)
        if batch.check_decode_mem():
            ratio = NewTokenRatioTracker.estimate_new_token_ratio_after_retract(batch.reqs)
            return victims, float(ratio), []
        more, ratio, aborted = retract()
        return victims + more, ratio, aborted

    def _victims(self, batch: ScheduleBatch) -> list[Req]:
        for req in batch.reqs:
            self.running.measure(req)
        missing = batch.new_tokens_required_next_decode()
        missing -= self._scheduler.token_to_kv_pool_allocator.available_size()
        plan = self._plan(batch.reqs, max(1, missing))
        return [self.running.req(request_id) for request_id in plan.swap_out]


def install(scheduler: Any, policy_name: str) -> None:
    """Put the iteration policy of that name in charge of `scheduler`, which was just made."""
    if policy_name == decode_option.EVERYONE:
        return
    order = getattr(scheduler, "tiered_kv_order", None)
    parts = scheduler.tree_cache.parts
    if order is None or parts.cost_model is None:
        logger.warning(
            "Tiered KV: everyone decodes in every iteration, since --tiered-kv-iteration-policy %s "
            "needs the cost model that this model has none of.",
            policy_name,
        )
        return
    policy = iteration_policies.get(policy_name)()
    is_cascade = planner_of(scheduler.tp_worker.model_runner) is not None
    selection = DecodeSelection(
        scheduler,
        policy,
        parts.cost_model,
        order.clock,
        turns=order.turns,
        is_cascade=is_cascade,
        on_parked=order.queue.parked,
    )
    order.clock.also_wanted(lambda: not scheduler.running_batch.is_empty())
    scheduler.tree_cache.decode_selection = selection
    scheduler.policy.tiered_kv_selection = selection
    order.room = selection
    logger.info("Tiered KV: who decodes is chosen by the policy %s.", policy_name)
