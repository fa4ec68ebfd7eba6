"""Hooks on SGLang's scheduler; `hooks.py` says where each one is attached and why."""

from __future__ import annotations

from typing import Any


def announce_disk_tier(result: None, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """Have the scheduler prefetch from storage exactly if the cache has a disk tier.

    AFTER `Scheduler.__init__`; everything that reads `enable_hicache_storage` reads it later.
    """
    if getattr(scheduler.server_args, "tiered_kv", False):
        scheduler.enable_hicache_storage = scheduler.tree_cache.enable_storage


def check_integrity_when_idle(scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """With `--tiered-kv-debug-integrity`, stop the server if the cache's books do not balance.

    BEFORE `Scheduler.on_idle`, which the loop calls whenever it has no batch to run.
    """
    if getattr(scheduler.server_args, "tiered_kv_debug_integrity", False):
        scheduler.tree_cache.check_integrity()
