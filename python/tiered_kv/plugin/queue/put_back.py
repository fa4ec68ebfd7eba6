"""A prompt that was begun goes back to the queue, so that more urgent ones need not wait for it.

SGLang computes one long prompt at a time, chunk by chunk, and nobody passes it. The chunks that are
computed stay in the cache, so a prompt that is put back loses no work as long as they stay there.

Under overlap the result of the last chunk is still to come when the next batch is formed. Until it
is there the request belongs to nobody: it must neither be admitted again nor be taken for idle
memory. The result comes within the same pass of the loop, before SGLang looks at anything else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tiered_kv.plugin.queue.again import Why, queue_again
from tiered_kv.plugin.queue.prefill_server import is_prefill_server
from tiered_kv.plugin.requests.view import is_named
from tiered_kv.plugin.upstream.current import request_kv

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


class PutBack:
    """At most one request on its way from `scheduler.chunked_req` back to the queue."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._leaving: Req | None = None

    def can_put_back(self) -> bool:
        """Whether the prompt under way could be begun again at the page where it stopped.

        Log-probabilities of its tokens are given chunk by chunk, and would be lost. On a prefill
        server its KV is on its way to where it decodes.
        """
        if is_prefill_server(self._scheduler):
            return False
        req = self._scheduler.chunked_req
        return (
            req is not None and not req.return_logprob and req.to_finish is None and is_named(req)
        )

    def take_out(self) -> None:
        """Form this batch without the prompt under way."""
        self._leaving, self._scheduler.chunked_req = self._scheduler.chunked_req, None

    def undo(self) -> bool:
        """Nobody fits without it: it goes on. Returns whether it had been taken out."""
        if self._leaving is None:
            return False
        self._scheduler.chunked_req, self._leaving = self._leaving, None
        return True

    def after_result(self) -> None:
        """A result was processed, if there was one to come: then the request waits again."""
        req = self._leaving
        if req is None or req.inflight_middle_chunks > 0:
            return
        self._leaving = None
        # The pages of its chunks are in the tree since the next batch was begun.
        request_kv.give_back(req, self._scheduler.tree_cache)
        queue_again(self._scheduler, req, Why.PUT_BACK)
