"""Hooks on SGLang's scheduler; `hooks.py` says where each one is attached and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tiered_kv.plugin.options.values import UPSTREAM_POLICY


def announce_disk_tier(result: None, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """Have the scheduler prefetch from storage exactly if the cache has cold stores.

    AFTER `Scheduler.__init__`; everything that reads `enable_hicache_storage` reads it later.
    """
    if getattr(scheduler.server_args, "tiered_kv", False):
        scheduler.enable_hicache_storage = scheduler.tree_cache.enable_storage


def refuse_what_never_fits(result: None, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """Have SGLang refuse prompts that its admission would never let in.

    AFTER `Scheduler.__init__`. It counts a page more than the prompt has tokens, and admits what is
    less than the pool (managers/schedule_policy.py: PrefillAdder.add_one_req); but it refuses on
    arrival only what is longer than the pool less a few tokens.
    """
    if getattr(scheduler.server_args, "tiered_kv", False):
        most = scheduler.max_total_num_tokens - scheduler.page_size
        scheduler.max_req_input_len = min(scheduler.max_req_input_len, most)


def check_integrity_when_idle(scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """With `--tiered-kv-debug-integrity`, stop the server if the cache's books do not balance.

    BEFORE `Scheduler.on_idle`, which the loop calls whenever it has no batch to run.
    """
    if getattr(scheduler.server_args, "tiered_kv_debug_integrity", False):
        scheduler.tree_cache.check_integrity()


def rest_when_idle(scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """Leave the interpreter to transfers while they are all there is to do.

    BEFORE `Scheduler.on_idle`; the loop comes back here at once while a request waits for pages.
    """
    if getattr(scheduler.server_args, "tiered_kv", False):
        scheduler.tree_cache.hierarchy.rest()


def order_waiting_queue(result: None, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """Put the policy that `--tiered-kv-policy` names in charge of the waiting queue.

    AFTER `Scheduler.__init__`.
    """
    server_args = scheduler.server_args
    if not getattr(server_args, "tiered_kv", False):
        return
    if server_args.tiered_kv_policy == UPSTREAM_POLICY:
        return
    from tiered_kv.plugin.queue.install import install

    install(scheduler, server_args.tiered_kv_policy)


def form_prefill(original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND `Scheduler._get_new_batch_prefill_raw`."""
    order = getattr(scheduler, "tiered_kv_order", None)
    if order is None:
        return original(scheduler, *args, **kwargs)
    running_batch = kwargs["running_batch"]
    return order.form_prefill(lambda: original(scheduler, *args, **kwargs), running_batch)


def put_in_order(
    original: Callable[..., None],
    schedule_policy: Any,
    waiting_queue: list[Any],
    running_batch: Any = None,
    *args: Any,
    **kwargs: Any,
) -> None:
    """AROUND `SchedulePolicy.calc_priority`, which the scheduler calls within the above."""
    order = getattr(schedule_policy, "tiered_kv_order", None)
    if order is None:
        original(schedule_policy, waiting_queue, running_batch, *args, **kwargs)
    else:
        order.put_in_order(waiting_queue, running_batch)


def may_start(
    original: Callable[..., bool], scheduler: Any, req: Any, *args: Any, **kwargs: Any
) -> bool:
    """AROUND `Scheduler._can_schedule_lora_req`: whether its adapter can be loaded now."""
    order = getattr(scheduler, "tiered_kv_order", None)
    if order is None:
        return original(scheduler, req, *args, **kwargs)
    allowed: bool = order.may_start(req, lambda: original(scheduler, req, *args, **kwargs))
    return allowed


def promise_load(adder: Any, req: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE `PrefillAdder.add_one_req`, where that wants exactly what was promised."""
    promise = getattr(adder.tree_cache, "promise_load", None)
    if promise is not None:
        promise(req)


def before_mixing(result: None, batch: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER `ScheduleBatch.prepare_for_extend`; decodes are mixed in right after it, if at all."""
    observer = getattr(batch.tree_cache, "observer", None)
    if observer is not None:
        observer.before_mixing()


def after_batch_result(result: None, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER `Scheduler.process_batch_result`."""
    order = getattr(scheduler, "tiered_kv_order", None)
    if order is not None:
        order.put_back.after_result()


def add_to_queue(
    original: Callable[..., None], scheduler: Any, req: Any, *args: Any, **kwargs: Any
) -> None:
    """AROUND `Scheduler._add_request_to_queue`, which may also refuse `req`."""
    order = getattr(scheduler, "tiered_kv_order", None)
    if order is None:
        original(scheduler, req, *args, **kwargs)
    else:
        order.add(req, lambda: original(scheduler, req, *args, **kwargs))
