"""Weights that change, and memory that is given away, while the server runs.

KV computed with other weights must not come back; and whoever needs an idle server gets one as far
as that depends on us (`idle.py`). What cannot be done is answered before anything is touched.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tiered_kv.plugin.cache import idle
from tiered_kv.plugin.upstream.current import hardware

if TYPE_CHECKING:
    from tiered_kv.plugin.cache.prefix_cache import TieredPrefixCache

logger = logging.getLogger(__name__)

# By what has the weights that the KV is computed with.
_caches: weakref.WeakKeyDictionary[Any, TieredPrefixCache] = weakref.WeakKeyDictionary()

Update = Callable[..., Any]


def track(cache: TieredPrefixCache, weights: object) -> None:
    _caches[weights] = cache


def agree_on_outcome(original: Update, updater: Any, *args: Any, **kwargs: Any) -> tuple[bool, str]:
    """AROUND update_weights_from_* of one rank: (success, message).

    An update that fails on one rank has failed; ranks that part here would wait for each other.
    And one that raises has failed, too: SGLang's own way back from a file of another shape does.
    """
    cache = _caches.get(hardware.weights_updated_by(updater))
    if cache is None:
        outcome: tuple[bool, str] = original(updater, *args, **kwargs)
        return outcome
    try:
        success, message = original(updater, *args, **kwargs)
    except Exception as error:
        logger.exception("Tiered KV: an update of the weights failed")
        success, message = False, f"{type(error).__name__}: {error}"
    (is_everywhere,) = cache.hierarchy.context.collective.minimum([int(success)])
    if success and not is_everywhere:
        message = "The update failed on another rank; see the server's log."
    return bool(is_everywhere), message


def update(original: Update, updater: Any, recv_req: Any) -> Any:
    """AROUND SchedulerWeightUpdaterManager.update_weights_from_*."""
    scheduler = updater.scheduler
    cache = idle.cache_of(scheduler)
    if cache is None:
        return original(updater, recv_req)
    if cache.hierarchy.context.stages is not None:
        return _refusal(
            recv_req,
            "The weights were not updated: stages of a pipeline cannot agree on it; restart the "
            "server.",
        )
    if not hardware.takes_weights(scheduler, recv_req):
        return _refusal(
            recv_req,
            "The weights were not updated: SGLang 0.5.17 takes them only as tensors or over a "
            "group with --speculative-algorithm NGRAM; send them so, or restart the server.",
        )
    if recv_req.flush_cache and not idle.make_idle(scheduler):
        return _refusal(
            recv_req,
            "The weights were not updated: requests are running, and the cache cannot be flushed "
            "under them; wait for them, pause them with mode retract, or send flush_cache: false.",
        )
    if not cache.hierarchy.drain():
        return _refusal(
            recv_req,
            "The weights were not updated: a copy between device and host hangs; restart the "
            "server.",
        )
    cache.weights.changing(is_computing=not scheduler.is_fully_idle())
    output = original(updater, recv_req)
    if not output.success:
        _failed(scheduler, cache, has_flush=recv_req.flush_cache)
    return output


def change_form(original: Update, updater: Any, recv_req: Any) -> Any:
    """AROUND SchedulerWeightUpdaterManager.begin_weight_update and end_weight_update.

    Either may put the weights into another form, parts of an update before or behind it.
    """
    cache = idle.cache_of(updater.scheduler)
    if cache is not None:
        cache.weights.changing(is_computing=not updater.scheduler.is_fully_idle())
    return original(updater, recv_req)


def _failed(scheduler: Any, cache: TieredPrefixCache, *, has_flush: bool) -> None:
    """The weights may be the old ones, the new ones, or a part of each: they say so themselves."""
    logger.warning("Tiered KV: an update of the weights has failed; looking which are in use now.")
    cache.look_at_weights()
    if has_flush and not cache.weights.is_named:
        scheduler.flush_cache()


def _refusal(recv_req: Any, message: str) -> Any:
    from sglang.srt.managers import io_struct

    logger.error("Tiered KV: %s", message)
    output = {
        io_struct.UpdateWeightFromDiskReqInput: io_struct.UpdateWeightFromDiskReqOutput,
        io_struct.UpdateWeightsFromDistributedReqInput: (
            io_struct.UpdateWeightsFromDistributedReqOutput
        ),
        io_struct.UpdateWeightsFromTensorReqInput: io_struct.UpdateWeightsFromTensorReqOutput,
        io_struct.UpdateWeightsFromIPCReqInput: io_struct.UpdateWeightsFromIPCReqOutput,
    }[type(recv_req)]
    return output(success=False, message=message)


def release_memory(original: Update, updater: Any, recv_req: Any) -> Any:
    """AROUND SchedulerWeightUpdaterManager.release_memory_occupation.

    The cache is empty, and no copy under way, before the memory goes. SGLang's answer cannot say
    no: what cannot be done is logged.
    """
    from sglang.srt.constants import (
        GPU_MEMORY_ALL_TYPES,
        GPU_MEMORY_TYPE_KV_CACHE,
        GPU_MEMORY_TYPE_WEIGHTS,
    )
    from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqOutput

    scheduler = updater.scheduler
    cache = idle.cache_of(scheduler)
    if cache is None:
        return original(updater, recv_req)
    tags = [t for t in recv_req.tags or GPU_MEMORY_ALL_TYPES if t not in updater.offload_tags]
    if not tags:
        return ReleaseMemoryOccupationReqOutput()
    if not idle.make_idle(scheduler) or not cache.hierarchy.drain():
        logger.error("Tiered KV: no memory was released, since the server is not idle.")
        return ReleaseMemoryOccupationReqOutput()
    if GPU_MEMORY_TYPE_KV_CACHE in tags:
        scheduler.flush_cache(empty_cache=False)
    if GPU_MEMORY_TYPE_WEIGHTS in tags:
        cache.weights.taken_away()
    recv_req.tags = tags
    return original(updater, recv_req)


def resume_memory(original: Update, updater: Any, recv_req: Any) -> Any:
    """AROUND SchedulerWeightUpdaterManager.resume_memory_occupation."""
    from sglang.srt.constants import GPU_MEMORY_ALL_TYPES, GPU_MEMORY_TYPE_WEIGHTS
    from sglang.srt.managers.io_struct import ResumeMemoryOccupationReqOutput

    cache = idle.cache_of(updater.scheduler)
    if cache is None:
        return original(updater, recv_req)
    tags = [tag for tag in recv_req.tags or GPU_MEMORY_ALL_TYPES if tag in updater.offload_tags]
    if not tags:
        return ResumeMemoryOccupationReqOutput()
    recv_req.tags = tags
    output = original(updater, recv_req)
    if GPU_MEMORY_TYPE_WEIGHTS in tags:
        cache.weights.back()
    return output


async def release_when_idle(original: Update, manager: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND TokenizerControlMixin.release_memory_occupation.

    Like an update of the weights it comes when all requests are over, unless they are paused.
    """
    if not getattr(manager.server_args, "tiered_kv", False) or manager.is_pause:
        return await original(manager, *args, **kwargs)
    async with manager.model_update_lock.writer_lock:
        return await original(manager, *args, **kwargs)
