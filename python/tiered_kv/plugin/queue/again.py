"""The one door by which a request that was under way comes back into SGLang's waiting queue.

| why | cached tokens | waited | retracted |
|---|---|---|---|
| `PUT_BACK`: a prompt that was begun, for others | as when it was first admitted: what \
the server has computed for it since is none | since it came back | no |
| `SWAPPED`: a request that decodes makes way for others | the same | the same | no; counted as \
made way |
| `NOT_LOADED`: KV that it goes on from could not be copied to the device | as when it is \
admitted again, if nothing was computed for it before | the same | no |
| SGLang's own: memory ran out, or generation is paused | the same | the same | yes |

All of them go through `Scheduler._add_request_to_queue`: that asks the disk for what has left the
host meanwhile, starts the clock of SGLANG_REQ_WAITING_TIMEOUT anew, and is where the queue's order
hears of them. On a prefill server a decode server would be asked again; see there.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any

from tiered_kv.plugin.queue.prefill_server import is_prefill_server, wait_again

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


class Why(enum.Enum):
    """Why we send a request back; SGLang has its own reasons."""

    PUT_BACK = "put back"
    SWAPPED = "swapped out"
    NOT_LOADED = "not loaded"


def queue_again(scheduler: Any, req: Req, why: Why) -> None:
    """`req`, which has given up its KV, waits with everyone else again."""
    n_retractions = req.retraction_count
    is_new = why is Why.NOT_LOADED and req.extend_batch_idx == 1 and not req.retracted_stain
    # Sets `retracted_stain` for good, with which SGLang counts no more cached tokens.
    req.reset_for_retract()
    # What SGLang counts as retractions means memory that ran out.
    req.retraction_count = n_retractions
    if is_new:
        _count_anew(req)
    if why is Why.SWAPPED:
        scheduler.tree_cache.parts.metrics.made_way()
    if is_prefill_server(scheduler):
        wait_again(scheduler, req)
    else:
        scheduler._add_request_to_queue(req)


def _count_anew(req: Req) -> None:
    """What was called cached was not."""
    req.retracted_stain = False
    req.cached_tokens = req.cached_tokens_device = 0
    req.cached_tokens_host = req.cached_tokens_storage = 0
    req._cache_breakdown_computed = False


def has_room(scheduler: Any) -> bool:
    """Whether one more may wait: SGLang aborts whoever joins a queue that is full."""
    most: int | None = scheduler.max_queued_requests
    return most is None or len(scheduler.waiting_queue) < most


def is_to_end(scheduler: Any, req: Req) -> bool:
    """Whether `req`, which was under way, was aborted before it left.

    SGLang would queue it all the same, compute it once more and end it then; or, if its prompt was
    not computed yet, forget that it was aborted.
    """
    return req.to_finish is not None or scheduler._pending_chunked_abort_req is req


def end_now(scheduler: Any, req: Req) -> None:
    """Tells the client that `req`, which is to end and holds no KV, has ended."""
    from sglang.srt.managers.io_struct import AbortReq

    if scheduler._pending_chunked_abort_req is req:
        scheduler._pending_chunked_abort_req = None
    reason = req.to_finish
    answer = AbortReq(rid=req.rid, finished_reason=None if reason is None else reason.to_json())
    scheduler.ipc_channels.send_to_tokenizer.send_output(answer, req)
