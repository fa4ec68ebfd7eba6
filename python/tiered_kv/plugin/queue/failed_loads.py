"""A forward pass over KV that never came from the host: its requests are computed again."""

from __future__ import annotations

import logging
from typing import Any

from tiered_kv.plugin.cache.idle import cache_of
from tiered_kv.plugin.queue.again import Why, queue_again
from tiered_kv.plugin.queue.prefill_server import end_unsent, is_partly_sent
from tiered_kv.plugin.upstream.current import request_kv

logger = logging.getLogger(__name__)


def after_run_batch(result: Any, scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER Scheduler.run_batch: nobody has seen yet what the pass computed."""
    cache = cache_of(scheduler)
    if cache is None or batch.hicache_consumer_index < 0:
        return
    if not cache.hierarchy.has_failed(batch.hicache_consumer_index):
        return
    reqs, batch.reqs = batch.reqs, []
    logger.error(
        "Tiered KV: pages could not be copied to the device (see above); the requests that needed "
        "them, %d, are computed again.",
        len(reqs),
    )
    for req in reqs:
        _give_back_what_the_pass_took(req, cache)
        request_kv.give_back(req, cache)
    cache.hierarchy.leave_failed_loads()
    cache.parts.metrics.failed_load()
    unfinished = scheduler.chunked_req
    if unfinished in reqs:
        scheduler.chunked_req = None
    scheduler.running_batch.batch_is_full = False
    for req in reqs:
        if is_partly_sent(scheduler, req):
            end_unsent(scheduler, req, req.inflight_middle_chunks - (req is unfinished))
        else:
            # SGLang skips the pass's result for whoever waits again.
            queue_again(scheduler, req, Why.NOT_LOADED)


def _give_back_what_the_pass_took(req: Any, cache: Any) -> None:
    """Slots of a token that nobody knows yet: its pass is still to be looked at (overlap).

    SGLang releases those of known tokens, and never sees a request leave at this point.
    """
    n_known = len(req.origin_input_ids) + len(req.output_ids)
    n_taken = request_kv.committed_tokens(req)
    if n_taken <= n_known:
        return
    allocator = cache.token_to_kv_pool_allocator
    begins_page = -(-n_known // allocator.page_size) * allocator.page_size
    if begins_page < n_taken:
        row = request_kv.row_of(req)
        slots = cache.req_to_token_pool.req_to_token[row, begins_page:n_taken]
        allocator.free_segment(slots, start_pos=begins_page)
    request_kv.forget_beyond(req, n_known)
