"""Requests that leave before they are done, whose turn that is, and what becomes of their KV."""

from __future__ import annotations

from tiered_kv.scheduler.request_policy import RequestPolicy
from tiered_kv.scheduler.waiting import WaitingQueue
from tiered_kv.simulation.cache import TieredCache
from tiered_kv.simulation.decode_batch import DecodeBatch
from tiered_kv.simulation.decode_selection import DecodeSelection
from tiered_kv.simulation.live import AnswerBlocks, LiveRequest
from tiered_kv.simulation.settings import InstanceSettings


class Departures:
    """Back to the queue: prompts put back, and running requests for which memory is short."""

    def __init__(
        self,
        settings: InstanceSettings,
        cache: TieredCache,
        waiting: WaitingQueue,
        running: DecodeBatch,
        policy: RequestPolicy,
        answers: AnswerBlocks,
        selection: DecodeSelection | None,
    ) -> None:
        """`selection` chooses who makes way; None: as upstream does."""
        self.n_retracted = 0
        self.n_put_back = 0
        self.n_swapped = 0
        self._selection = selection
        self._can_swap = settings.swap
        self._running = running
        self._cache = cache
        self._waiting = waiting
        self._policy = policy
        self._answers = answers

    def put_back(self, live: LiveRequest, now_s: float) -> None:
        """A prompt that was begun goes back for others; its whole blocks stay as cache."""
        self.n_put_back += 1
        self._back(live, now_s)

    def order(self, now_s: float) -> list[LiveRequest]:
        """Who goes first if those who run lack memory for their next tokens."""
        order = self._running.retraction_order()
        if self._selection is None or not self._can_swap:
            return order
        by_id = {live.queued.request_id: live for live in order}
        chosen = self._selection.swap_out(now_s, len(order), None)
        return [by_id.pop(request_id) for request_id in chosen] + list(by_id.values())

    def make_way(
        self, live: LiveRequest, missing_tokens: int, now_s: float, processed_tokens: int
    ) -> bool:
        """Whether some who run went so that `live`, which waits, can be admitted soon."""
        if self._selection is None or not self._selection.may_preempt(live):
            return False
        by_id = {one.queued.request_id: one for one in self._running.requests}
        victims = self._selection.swap_out(now_s, missing_tokens, live.queued.slo.tbt_s)
        for request_id in victims:
            by_id[request_id].n_made_way += 1
            self.leave(by_id[request_id], now_s, processed_tokens)
        return bool(victims)

    def leave(self, live: LiveRequest, now_s: float, processed_tokens: int) -> None:
        """A running request goes back to the queue, with its KV or, as upstream does it, without.

        With it, all whole blocks stay as cache and are written to the host like any other; what
        fills no block is computed again. Pages that the host lacks are free when they are written.
        """
        self.leave_batch(live)
        queued = live.queued
        if self._can_swap:
            self.n_swapped += 1
            live.n_swaps += 1
            tokens = self._answers.blocks(live)
            self._cache.commit(live, tokens, queued.prefilled_tokens)
            queued.tokens = tokens
        else:
            self.n_retracted += 1
            queued.n_retractions += 1
        queued.queued_s = now_s
        queued.processed_at_arrival = processed_tokens
        self._back(live, now_s)

    def leave_batch(self, live: LiveRequest) -> None:
        """It decodes no more, and is no longer parked."""
        self._running.remove(live)
        if self._selection is not None:
            self._selection.left(live)

    def _back(self, live: LiveRequest, now_s: float) -> None:
        self._cache.release(live)
        live.queued.prefilled_tokens = 0
        # As at its arrival: what has left the host meanwhile may be on disk.
        self._cache.prefetch(live)
        self._waiting.add(live.queued)
        self._policy.on_arrival(live.queued, now_s)
