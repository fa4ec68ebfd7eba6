"""The part of `hooks.HOOKS` for stages of a pipeline."""

from __future__ import annotations

from tiered_kv.plugin.hooks.hook import Hook, Process

_SHUTDOWN = "stages would be killed with pages still on their way to the disk"

STAGES_HOOKS = tuple(
    Hook(
        target=f"sglang.srt.managers.scheduler.Scheduler.{method}",
        kind=kind,
        function=f"tiered_kv.plugin.cache.stage_loop:{function}",
        process=Process.SCHEDULER,
        why=why,
    )
    for method, kind, function, why in (
        (
            "get_next_batch_to_run",
            "before",
            "begin_pass",
            "stages of a pipeline would not know which pass they are in",
        ),
        ("handle_shutdown", "after", "end_last_stage", _SHUTDOWN),
        ("_pp_send_pyobj_to_next_stage", "before", "end_stage", _SHUTDOWN),
        ("run_event_loop", "around", "run_loop", _SHUTDOWN),
    )
)
