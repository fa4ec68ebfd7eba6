"""Hooks for models with recurrent state; `recurrent_table.py` says where they are attached.

They do nothing where the cache is of another kind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tiered_kv.plugin.upstream.current import request_kv


def _states_of(cache: Any) -> Any:
    """The cache if it keeps states, else None."""
    return cache if getattr(cache, "states", None) is not None else None


def after_alloc(result: list[int] | None, pool: Any, reqs: list[Any], *args: Any) -> None:
    """AFTER `HybridReqToTokenPool.alloc`: whoever goes on from a checkpoint gets a copy of it."""
    cache = _states_of(getattr(pool, "tiered_kv_cache", None))
    if cache is not None and result is not None:
        for req in reqs:
            cache.seed(req)


def after_run_batch(result: Any, scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER `Scheduler.run_batch`: states at the ends of pages are kept before they go on."""
    cache = _states_of(scheduler.tree_cache)
    if cache is not None and batch.forward_mode.is_decode():
        cache.passed(batch)


def add_one_req(
    original: Callable[..., Any], adder: Any, req: Any, *args: Any, **kwargs: Any
) -> Any:
    """AROUND `PrefillAdder.add_one_req`."""
    cache = _states_of(adder.tree_cache)
    if cache is None:
        return original(adder, req, *args, **kwargs)
    start = request_kv.prefix_tokens(req) + req.host_hit_length
    with_stop = _chunk_to_stop(cache, adder, req, start)
    result = original(adder, req, *args, **kwargs)
    if with_stop is not None and req not in adder.can_run_list[-1:]:
        adder.rem_chunk_tokens = with_stop
    return result


def add_chunked_req(
    original: Callable[..., Any], adder: Any, req: Any, *args: Any, **kwargs: Any
) -> Any:
    """AROUND `PrefillAdder.add_chunked_req`, which adds `req` in any case."""
    cache = _states_of(adder.tree_cache)
    if cache is not None:
        _chunk_to_stop(cache, adder, req, request_kv.prefix_tokens(req))
    return original(adder, req, *args, **kwargs)


def _chunk_to_stop(cache: Any, adder: Any, req: Any, start: int) -> int | None:
    """Has the chunk of `req` from `start` on end at its next checkpoint, if it would run past it.

    Nobody is added behind it in this pass then, as behind any prompt that does not end in it.
    Returns what room the pass had before, or None if nothing was changed.
    """
    stop, room = cache.stop_before(req, start), adder.rem_chunk_tokens
    if stop is None or room is None or stop - start > room:
        return None
    adder.rem_chunk_tokens = stop - start
    return int(room)
