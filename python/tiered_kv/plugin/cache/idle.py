"""An idle server, for whoever needs one: a flush, an update of the weights, a release of memory.

SGLang asks whether its scheduler is idle, and gives up or ends the process if not. What the tiers
do in the background never counts: a flush settles it. And requests that are paused and hold no KV
are as good as none.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tiered_kv.plugin.upstream.current import request_kv

if TYPE_CHECKING:
    from tiered_kv.plugin.cache.prefix_cache import TieredPrefixCache

logger = logging.getLogger(__name__)


def cache_of(scheduler: Any) -> TieredPrefixCache | None:
    """Our cache, if the scheduler has it."""
    if scheduler is None or not getattr(scheduler.server_args, "tiered_kv", False):
        return None
    cache: TieredPrefixCache = scheduler.tree_cache
    return cache


def is_fully_idle(
    original: Callable[..., bool], scheduler: Any, for_health_check: bool = False, **kwargs: Any
) -> bool:
    """AROUND Scheduler.is_fully_idle: so it is if all there is waits, paused, and holds no KV."""
    if original(scheduler, for_health_check, **kwargs):
        return True
    if for_health_check or not scheduler._engine_paused or cache_of(scheduler) is None:
        return False
    waiting = scheduler.waiting_queue
    if not waiting or any(map(request_kv.holds_kv, waiting)):
        return False
    scheduler.waiting_queue = []
    try:
        return original(scheduler, for_health_check, **kwargs)
    finally:
        scheduler.waiting_queue = waiting


def make_idle(scheduler: Any) -> bool:
    """Whether the scheduler is idle now. Who runs, but is paused, waits again, without its KV.

    A result that is still to be processed is, too: of requests that have ended meanwhile.
    """
    from sglang.srt.managers.io_struct import PauseGenerationReqInput

    if scheduler.is_fully_idle():
        return True
    was_paused = scheduler._engine_paused
    if not was_paused and _has_work(scheduler):
        return False
    scheduler.pause_generation(PauseGenerationReqInput(mode="retract"))
    scheduler._engine_paused = was_paused
    return bool(scheduler.is_fully_idle())


def _has_work(scheduler: Any) -> bool:
    batches = (scheduler.running_batch, scheduler.last_batch)
    running = [req for batch in batches if batch is not None for req in batch.reqs]
    return bool(
        scheduler.waiting_queue
        or scheduler.chunked_req is not None
        or any(not req.finished() for req in running)
    )


def flush_cache(original: Callable[..., bool], scheduler: Any, *args: Any, **kwargs: Any) -> bool:
    """AROUND Scheduler.flush_cache."""
    cache = cache_of(scheduler)
    if cache is None:
        return original(scheduler, *args, **kwargs)
    if scheduler.is_fully_idle() and not cache.hierarchy.drain():
        logger.error("Tiered KV: not flushed, since a copy between device and host hangs.")
        return False
    return original(scheduler, *args, **kwargs)


def look_on_disk(
    original: Callable[..., None], scheduler: Any, req: Any, *args: Any, **kwargs: Any
) -> None:
    """AROUND Scheduler._prefetch_kvcache: not during a pause, which may end with other weights."""
    if cache_of(scheduler) is None or not scheduler._engine_paused:
        original(scheduler, req, *args, **kwargs)


def after_pause(result: None, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER Scheduler.continue_generation."""
    if cache_of(scheduler) is not None:
        for req in scheduler.waiting_queue:
            scheduler._prefetch_kvcache(req)


def keep_up_while_paused(result: None, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER Scheduler.process_input_requests, which is all that a paused loop does."""
    if not scheduler._engine_paused:
        return
    cache = cache_of(scheduler)
    # A stage's loop goes on, and polls by itself.
    if cache is not None and cache.hierarchy.context.stages is None:
        cache.keep_up()


def sleep_when_idle(original: Callable[..., None], scheduler: Any) -> None:
    """AROUND Scheduler.maybe_sleep_on_idle: not while there are transfers to acknowledge."""
    cache = cache_of(scheduler)
    if cache is None or not cache.hierarchy.progress.is_busy:
        original(scheduler)
