"""The part of `hooks.HOOKS` for updates of the weights, flushes, released memory and pauses."""

from __future__ import annotations

from tiered_kv.plugin.hooks.hook import Hook, Process

_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_UPDATER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"

ADMINISTRATION_HOOKS = (
    *(
        Hook(
            target=f"{_UPDATER}.update_weights_from_{source}",
            kind="around",
            function="tiered_kv.plugin.cache.weight_updates:update",
            process=Process.SCHEDULER,
            why="KV computed with the old weights would be served after an update",
        )
        for source in ("disk", "distributed", "tensor", "ipc")
    ),
    *(
        Hook(
            target=f"sglang.srt.managers.tp_worker.BaseTpWorker.update_weights_from_{source}",
            kind="around",
            function="tiered_kv.plugin.cache.weight_updates:agree_on_outcome",
            process=Process.SCHEDULER,
            why="an update that fails would end the server, or part tensor-parallel ranks",
        )
        for source in ("disk", "distributed", "tensor", "ipc")
    ),
    Hook(
        target=f"{_UPDATER}.release_memory_occupation",
        kind="around",
        function="tiered_kv.plugin.cache.weight_updates:release_memory",
        process=Process.SCHEDULER,
        why="pages would be copied from and to memory that is not there any more",
    ),
    Hook(
        target=f"{_UPDATER}.resume_memory_occupation",
        kind="around",
        function="tiered_kv.plugin.cache.weight_updates:resume_memory",
        process=Process.SCHEDULER,
        why="KV computed with the weights before would go by the name of those that come back",
    ),
    Hook(
        target="sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin"
        ".release_memory_occupation",
        kind="around",
        function="tiered_kv.plugin.cache.weight_updates:release_when_idle",
        process=Process.TOKENIZER,
        why="memory would not be released while a request runs, without anybody being told",
    ),
    Hook(
        target=f"{_SCHEDULER}.is_fully_idle",
        kind="around",
        function="tiered_kv.plugin.cache.idle:is_fully_idle",
        process=Process.SCHEDULER,
        why="an update of the weights would end the server while requests are paused",
    ),
    Hook(
        target=f"{_SCHEDULER}.flush_cache",
        kind="around",
        function="tiered_kv.plugin.cache.idle:flush_cache",
        process=Process.SCHEDULER,
        why="memory that is still being copied would be given to others",
    ),
    Hook(
        target=f"{_SCHEDULER}.process_input_requests",
        kind="after",
        function="tiered_kv.plugin.cache.idle:keep_up_while_paused",
        process=Process.SCHEDULER,
        why="pages on their way would wait for the end of a pause",
    ),
    Hook(
        target=f"{_SCHEDULER}._prefetch_kvcache",
        kind="around",
        function="tiered_kv.plugin.cache.idle:look_on_disk",
        process=Process.SCHEDULER,
        why="KV of the old weights would be brought nearer before an update that flushes nothing",
    ),
    Hook(
        target=f"{_SCHEDULER}.continue_generation",
        kind="after",
        function="tiered_kv.plugin.cache.idle:after_pause",
        process=Process.SCHEDULER,
        why="what requests that were paused could have from the disk would be computed",
    ),
    Hook(
        target=f"{_SCHEDULER}.maybe_sleep_on_idle",
        kind="around",
        function="tiered_kv.plugin.cache.idle:sleep_when_idle",
        process=Process.SCHEDULER,
        why="pages on their way would wait for the next request",
    ),
    Hook(
        target=f"{_SCHEDULER}.run_batch",
        kind="after",
        function="tiered_kv.plugin.queue.failed_loads:after_run_batch",
        process=Process.SCHEDULER,
        why="a copy to the device that fails would be answered with whatever lies there",
    ),
)
