"""The part of `hooks.HOOKS` for servers that compute prompts for others to decode."""

from __future__ import annotations

from tiered_kv.plugin.hooks.hook import Hook, Process

_PREFILL = "sglang.srt.disaggregation.prefill"

PREFILL_HOOKS = (
    Hook(
        target=f"{_PREFILL}.PrefillBootstrapQueue.pop_bootstrapped",
        kind="after",
        function="tiered_kv.plugin.queue.prefill_server:joined",
        process=Process.SCHEDULER,
        why="a policy would not know who waits",
    ),
    Hook(
        target=f"{_PREFILL}.SchedulerDisaggregationPrefillMixin"
        ".process_batch_result_disagg_prefill",
        kind="around",
        function="tiered_kv.plugin.queue.prefill_server:process_result",
        process=Process.SCHEDULER,
        why="requests whose KV could not be copied to the device would end the server",
    ),
)
