"""Hooks that are attached elsewhere in SGLang 0.5.17 than in other releases, or nowhere."""

from __future__ import annotations

_PREFILL = "sglang.srt.disaggregation.prefill"

#: Target in `hooks/` -> the target here, and our function for it; None: there is none.
ELSEWHERE: dict[str, tuple[str, str] | None] = {}
#: Hooks that this release alone needs: (target, kind, our function, why).
MORE: tuple[tuple[str, str, str, str], ...] = (
    (
        f"{_PREFILL}.SchedulerDisaggregationPrefillMixin.maybe_send_cached_prefix_chunk",
        "around",
        "tiered_kv.plugin.queue.prefill_server:send_cached_prefix",
        "KV that is still on its way from the host would be sent as it is",
    ),
    *(
        (
            f"sglang.srt.managers.scheduler.Scheduler.{method}",
            kind,
            f"tiered_kv.plugin.queue.prefill_server:{function}",
            "prefill servers would be killed with pages still on their way to the disk",
        )
        for method, kind, function in (
            ("handle_shutdown", "after", "end_loop"),
            ("run_event_loop", "around", "run_loop"),
        )
    ),
    (
        "sglang.srt.mem_cache.memory_pool.HybridReqToTokenPool.alloc",
        "after",
        "tiered_kv.plugin.hooks.recurrent:after_alloc",
        "requests would go on from cached KV with an empty recurrent state",
    ),
    (
        "sglang.srt.managers.scheduler.Scheduler.run_batch",
        "after",
        "tiered_kv.plugin.hooks.recurrent:after_run_batch",
        "no recurrent state would be kept of what requests produce",
    ),
    (
        "sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req",
        "around",
        "tiered_kv.plugin.hooks.recurrent:add_one_req",
        "no recurrent state would be kept where prompts part",
    ),
    (
        "sglang.srt.managers.schedule_policy.PrefillAdder.add_chunked_req",
        "around",
        "tiered_kv.plugin.hooks.recurrent:add_chunked_req",
        "no recurrent state would be kept where prompts part",
    ),
)
