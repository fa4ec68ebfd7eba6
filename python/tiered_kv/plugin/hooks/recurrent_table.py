"""The part of `hooks.HOOKS` for models with recurrent state."""

from __future__ import annotations

from tiered_kv.plugin.hooks.hook import Hook, Process

_MANAGERS = "sglang.srt.managers"
_CUTS = "no recurrent state would be kept where prompts part"

RECURRENT_HOOKS = tuple(
    Hook(target, kind, f"tiered_kv.plugin.hooks.recurrent:{function}", Process.SCHEDULER, why)
    for target, kind, function, why in (
        (
            "sglang.srt.mem_cache.memory_pool.HybridReqToTokenPool.alloc",
            "after",
            "after_alloc",
            "requests would go on from cached KV with an empty recurrent state",
        ),
        (
            f"{_MANAGERS}.scheduler.Scheduler.run_batch",
            "after",
            "after_run_batch",
            "no recurrent state would be kept of what requests produce",
        ),
        (f"{_MANAGERS}.schedule_policy.PrefillAdder.add_one_req", "around", "add_one_req", _CUTS),
        (
            f"{_MANAGERS}.schedule_policy.PrefillAdder.add_chunked_req",
            "around",
            "add_chunked_req",
            _CUTS,
        ),
    )
)
