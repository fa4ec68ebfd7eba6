"""A prompt that was begun goes back to the queue, so that more urgent ones need not wait for it.

SGLang computes one long prompt at a time, chunk by chunk, and nobody passes it. The chunks that are
computed stay in the cache, so a parked prompt loses no work as long as they stay there.

Under overlap the result of the last chunk is still to come when the next batch is formed. Until it
is there the request belongs to nobody: it must neither be admitted again nor be taken for idle
memory. The result comes within the same pass of the loop, before SGLang looks at anything else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tiered_kv.plugin.cache.prefix_cache import is_named_by_tokens

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from tiered_kv.plugin.queue.clock_tick import SharedClock
    from tiered_kv.plugin.queue.queued import QueuedRequests


class Parking:
    """At most one request on its way from `scheduler.chunked_req` back to the queue."""

    def __init__(self, scheduler: Any, queue: QueuedRequests, clock: SharedClock) -> None:
        self._scheduler = scheduler
        self._queue = queue
        self._clock = clock
        self._leaving: Req | None = None

    def can_park(self) -> bool:
        """Whether the prompt under way could be begun again at the page where it stopped.

        Log-probabilities of its tokens are given chunk by chunk, and would be lost.
        """
        req = self._scheduler.chunked_req
        return (
            req is not None
            and not req.return_logprob
            and req.to_finish is None
            and is_named_by_tokens(req)
        )

    def take_out(self) -> None:
        """Form this batch without the prompt under way."""
        self._leaving, self._scheduler.chunked_req = self._scheduler.chunked_req, None

    def settle(self, batch: Any) -> None:
        """`batch` was formed, or none was: then there was nobody to make way for."""
        if self._leaving is not None and batch is None:
            self._scheduler.chunked_req, self._leaving = self._leaving, None
        self.after_result()

    def after_result(self) -> None:
        """A result was processed: if it was that of the last chunk, the request waits again."""
        req = self._leaving
        if req is None or req.inflight_middle_chunks > 0:
            return
        from sglang.srt.mem_cache.common import release_kv_cache

        self._leaving = None
        scheduler = self._scheduler
        # The pages of its chunks are in the tree since the next batch was begun.
        release_kv_cache(req, scheduler.tree_cache, is_insert=False)
        n_retractions, was_retracted = req.retraction_count, req.retracted_stain
        req.reset_for_retract()
        # It gave up nothing: what SGLang counts as retractions means memory that ran out.
        req.retraction_count, req.retracted_stain = n_retractions, was_retracted
        scheduler.waiting_queue.append(req)
        self._queue.parked(req, self._clock)
