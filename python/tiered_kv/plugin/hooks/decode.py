"""Hooks for choosing who decodes; `hooks.py` says where each one is attached and why.

Where no policy chooses, they find nothing on the cache or the scheduler, and do nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tiered_kv.plugin.decode.selection import DecodeSelection


def _of(tree_cache: Any) -> DecodeSelection | None:
    selection: DecodeSelection | None = getattr(tree_cache, "decode_selection", None)
    return selection


def update_running_batch(
    original: Callable[..., Any], scheduler: Any, batch: Any, *args: Any, **kwargs: Any
) -> Any:
    """AROUND `Scheduler.update_running_batch`."""
    selection = _of(scheduler.tree_cache)
    if selection is None:
        return original(scheduler, batch, *args, **kwargs)
    return selection.update(batch, lambda: original(scheduler, batch, *args, **kwargs))


def check_decode_mem(
    original: Callable[..., bool], batch: Any, selected_indices: list[int] | None = None
) -> bool:
    """AROUND `ScheduleBatch.check_decode_mem`; indices mean that SGLang is making room already."""
    selection = _of(batch.tree_cache)
    if selection is None or selected_indices is not None:
        return original(batch, selected_indices)
    return selection.fits_in_memory(batch, functools.partial(original, batch))


def prepare_for_decode(
    original: Callable[..., None], batch: Any, *args: Any, **kwargs: Any
) -> None:
    """AROUND `ScheduleBatch.prepare_for_decode`."""
    selection = _of(batch.tree_cache)
    if selection is None:
        original(batch, *args, **kwargs)
    else:
        selection.prepare(batch, lambda: original(batch, *args, **kwargs))


def batch_to_run(
    original: Callable[..., Any], adapter: Any, local_batch: Any, *args: Any, **kwargs: Any
) -> Any:
    """AROUND `SchedulerDPAttnAdapter.maybe_prepare_mlp_sync_batch`: all that runs passes here."""
    selection = None if local_batch is None else _of(local_batch.tree_cache)
    if selection is not None:
        local_batch = selection.batch_to_run(local_batch)
    return original(adapter, local_batch, *args, **kwargs)


def retract_decode(
    original: Callable[..., Any], batch: Any, *args: Any
) -> tuple[list[Any], float, list[Any]]:
    """AROUND `ScheduleBatch.retract_decode`: (retracted, new token ratio, aborted)."""
    selection = _of(batch.tree_cache)
    if selection is None:
        result: tuple[list[Any], float, list[Any]] = original(batch, *args)
        return result

    def release(row: int, n_stay: int) -> object:
        return batch.release_req(row, n_stay, *args)

    return selection.make_room(batch, release, lambda: original(batch, *args))


def note_first_in_queue(
    result: None, schedule_policy: Any, waiting_queue: list[Any], *args: Any, **kwargs: Any
) -> None:
    """AFTER `SchedulePolicy.calc_priority`, which has put the queue in order."""
    selection = getattr(schedule_policy, "tiered_kv_selection", None)
    if selection is not None:
        order = getattr(schedule_policy, "tiered_kv_order", None)
        selection.queue_in_order(waiting_queue, () if order is None else order.able())


def after_batch_result(result: None, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER `Scheduler.process_batch_result`."""
    selection = _of(scheduler.tree_cache)
    if selection is not None:
        selection.after_result()


def choose_who_decodes(result: None, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER `Scheduler.__init__`: puts the policy of `--tiered-kv-iteration-policy` in charge."""
    if not getattr(scheduler.server_args, "tiered_kv", False):
        return
    from tiered_kv.plugin.decode.selection import install

    scheduler.tree_cache.resumes_requests = True
    install(scheduler, scheduler.server_args.tiered_kv_iteration_policy)
