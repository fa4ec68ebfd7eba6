"""A forward pass over KV that never came from the host: its requests are computed again."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from tiered_kv.plugin.cache.idle import cache_of

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

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
        _give_back(req, cache)
    cache.hierarchy.leave_failed_loads()
    cache.parts.metrics.failed_load()
    if scheduler.chunked_req in reqs:
        scheduler.chunked_req = None
    scheduler.running_batch.batch_is_full = False
    for req in reqs:
        scheduler._add_request_to_queue(req)


def _give_back(req: Req, tree_cache: Any) -> None:
    """What it holds on the device is free and in no tree, and the pass has no result for it."""
    from sglang.srt.mem_cache.common import release_kv_cache

    # Nothing was computed for it before, so what was called cached is counted when it is.
    is_first_pass = req.extend_batch_idx == 1 and not req.retracted_stain
    n_retractions = req.retraction_count
    release_kv_cache(req, tree_cache, is_insert=False)
    req.reset_for_retract()
    # What SGLang counts as retractions means memory that ran out.
    req.retraction_count = n_retractions
    if is_first_pass:
        req.retracted_stain = False
        req.cached_tokens = req.cached_tokens_device = 0
        req.cached_tokens_host = req.cached_tokens_storage = 0
        req._cache_breakdown_computed = False
