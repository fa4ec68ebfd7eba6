"""The part of `hooks.HOOKS` for Ctrl-C, which reaches every process of a terminal."""

from __future__ import annotations

from tiered_kv.plugin.hooks.hook import Hook, Process

INTERRUPT_HOOKS = (
    *(
        Hook(
            target=f"sglang.srt.managers.{target}.__init__",
            kind="before",
            function="tiered_kv.plugin.start.interrupts:leave_to_launcher",
            process=process,
            why="Ctrl-C would end this process in the middle of its work, with a traceback",
        )
        for target, process in (
            ("scheduler.Scheduler", Process.SCHEDULER),
            ("detokenizer_manager.DetokenizerManager", Process.DETOKENIZER),
        )
    ),
    Hook(
        target="sglang.srt.entrypoints.http_server._setup_and_run_http_server",
        kind="around",
        function="tiered_kv.plugin.start.interrupts:end_without_traceback",
        process=Process.HTTP_SERVER,
        why="Ctrl-C would end 0.5.23 with a traceback",
    ),
)
