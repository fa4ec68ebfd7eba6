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
)
