"""The hooks on SGLang, in one table: applied only with `--tiered-kv`, checked before serving.

SGLang swallows a hook whose target is missing and applies none to a target that another plugin
hooked before, so `install` applies ours itself, and `verify_installed` looks at what is in effect.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from tiered_kv.core.errors import UpstreamError
from tiered_kv.plugin.hooks.administration_table import ADMINISTRATION_HOOKS
from tiered_kv.plugin.hooks.decode_table import DECODE_HOOKS
from tiered_kv.plugin.hooks.drafts_table import DRAFT_HOOKS
from tiered_kv.plugin.hooks.guard_table import GUARD_HOOKS
from tiered_kv.plugin.hooks.hook import Hook, Process
from tiered_kv.plugin.hooks.interrupts_table import INTERRUPT_HOOKS
from tiered_kv.plugin.hooks.naming_table import NAMING_HOOKS
from tiered_kv.plugin.hooks.prefill_table import PREFILL_HOOKS
from tiered_kv.plugin.hooks.recurrent_table import RECURRENT_HOOKS
from tiered_kv.plugin.hooks.stages_table import STAGES_HOOKS
from tiered_kv.plugin.upstream.current import targets

SHARED_HOOKS: tuple[Hook, ...] = (
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.__init__",
        kind="after",
        function="tiered_kv.plugin.hooks.scheduler:announce_disk_tier",
        process=Process.SCHEDULER,
        why="the scheduler only prefetches from disk if its enable_hicache_storage is set, and "
        "SGLang derives that from --hicache-storage-backend alone",
    ),
    *INTERRUPT_HOOKS,
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.on_idle",
        kind="before",
        function="tiered_kv.plugin.hooks.scheduler:check_integrity_when_idle",
        process=Process.SCHEDULER,
        why="--tiered-kv-debug-integrity checks the cache's bookkeeping between requests",
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.on_idle",
        kind="before",
        function="tiered_kv.plugin.hooks.scheduler:rest_when_idle",
        process=Process.SCHEDULER,
        why="a loop that spins while pages are on their way slows them down",
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.run_batch",
        kind="after",
        function="tiered_kv.plugin.passes.step_times:after_run_batch",
        process=Process.SCHEDULER,
        why="how long prefills take decides what is loaded and what is computed",
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.process_batch_result",
        kind="after",
        function="tiered_kv.plugin.passes.step_times:after_batch_result",
        process=Process.SCHEDULER,
        why="how long prefills take decides what is loaded and what is computed",
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.__init__",
        kind="after",
        function="tiered_kv.plugin.hooks.scheduler:order_waiting_queue",
        process=Process.SCHEDULER,
        why="--tiered-kv-policy would order nothing",
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler._get_new_batch_prefill_raw",
        kind="around",
        function="tiered_kv.plugin.hooks.scheduler:form_prefill",
        process=Process.SCHEDULER,
        why="a policy says who is admitted, and how much is prefilled at once",
    ),
    Hook(
        target="sglang.srt.managers.schedule_policy.SchedulePolicy.calc_priority",
        kind="around",
        function="tiered_kv.plugin.hooks.scheduler:put_in_order",
        process=Process.SCHEDULER,
        why="the waiting queue would be in SGLang's order instead of the policy's",
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler._can_schedule_lora_req",
        kind="around",
        function="tiered_kv.plugin.hooks.scheduler:may_start",
        process=Process.SCHEDULER,
        why="requests for a rare adapter would be passed over for ever",
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.__init__",
        kind="after",
        function="tiered_kv.plugin.hooks.scheduler:refuse_what_never_fits",
        process=Process.SCHEDULER,
        why="a prompt within a page of the pool would wait for ever, and everyone behind it",
    ),
    Hook(
        target="sglang.srt.managers.schedule_batch.ScheduleBatch.prepare_for_extend",
        kind="after",
        function="tiered_kv.plugin.hooks.scheduler:before_mixing",
        process=Process.SCHEDULER,
        why="decodes that are mixed into a prefill could find no page, which stops the server",
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.process_batch_result",
        kind="after",
        function="tiered_kv.plugin.hooks.scheduler:after_batch_result",
        process=Process.SCHEDULER,
        why="a prompt that is put back would never wait again",
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler._add_request_to_queue",
        kind="around",
        function="tiered_kv.plugin.hooks.scheduler:add_to_queue",
        process=Process.SCHEDULER,
        why="a policy is told of arrivals instead of looking for them in every step",
    ),
    *(
        Hook(
            target=f"sglang.srt.managers.{target}",
            kind=kind,
            function=f"tiered_kv.plugin.{function}",
            process=Process.SCHEDULER,
            why=why,
        )
        for target, kind, function, why in DECODE_HOOKS
    ),
    Hook(
        target="sglang.srt.managers.scheduler_components.request_receiver"
        ".SchedulerRequestReceiver._broadcast_reqs_across_ranks",
        kind="around",
        function="tiered_kv.plugin.queue.clock_tick:carry_tick",
        process=Process.SCHEDULER,
        why="tensor-parallel ranks that decide by clocks of their own would part",
    ),
    Hook(
        target="sglang.srt.managers.scheduler_components.request_receiver"
        ".SchedulerRequestReceiver._split_work_and_control_reqs",
        kind="around",
        function="tiered_kv.plugin.queue.clock_tick:keep_tick_with_work",
        process=Process.SCHEDULER,
        why="with DP attention all ranks get what the first has, but for requests, and it may be "
        "idle when others need the time",
    ),
    Hook(
        target="sglang.srt.observability.req_time_stats.APIServerReqTimeStats.__getstate__",
        kind="after",
        function="tiered_kv.plugin.queue.clock_tick:send_creation_time",
        process=Process.TOKENIZER,
        why="deadlines would be counted from when the scheduler looks for requests, which may be a "
        "whole forward pass after they came",
    ),
    *ADMINISTRATION_HOOKS,
    Hook(
        target="sglang.srt.entrypoints.http_server.ORJSONRequest.json",
        kind="around",
        function="tiered_kv.plugin.requests.adapter:check_http_request",
        process=Process.HTTP_SERVER,
        why="an slo in a body or in headers would be ignored, and a bad one answered with 200",
    ),
    *(
        Hook(
            target=f"sglang.srt.entrypoints.openai.serving_{route}",
            kind=kind,
            function=f"tiered_kv.plugin.requests.openai_responses:{function}",
            process=Process.HTTP_SERVER,
            why="OpenAI's responses would lack the report that was asked for",
        )
        for route, kind, function in (
            ("chat.OpenAIServingChat._build_chat_response", "after", "add_to_response"),
            ("chat.OpenAIServingChat._generate_chat_stream", "around", "add_to_stream"),
            (
                "completions.OpenAIServingCompletion._build_completion_response",
                "after",
                "add_to_response",
            ),
            (
                "completions.OpenAIServingCompletion._generate_completion_stream",
                "around",
                "add_to_stream",
            ),
        )
    ),
    *(
        Hook(
            target=f"sglang.srt.entrypoints.engine.Engine.{method}",
            kind="around",
            function="tiered_kv.plugin.requests.adapter:take_engine_fields",
            process=Process.ENGINE,
            why="the engine would not take slo= and hints=",
        )
        for method in ("generate", "async_generate")
    ),
    Hook(
        target="sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request",
        kind="around",
        function="tiered_kv.plugin.requests.adapter:lift_fields",
        process=Process.TOKENIZER,
        why="an slo would not be checked before the request is queued, nor reach the scheduler",
    ),
    *(
        Hook(
            target=f"sglang.srt.managers.tokenizer_manager.TokenizerManager.{method}",
            kind="around",
            function=f"tiered_kv.plugin.requests.choices:{function}",
            process=Process.TOKENIZER,
            why="with several choices a request would report as cached what it computed itself",
        )
        for method, function in (
            ("_handle_batch_request", "open_accounts"),
            ("_wait_one_response", "keep_accounts"),
        )
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.__init__",
        kind="after",
        function="tiered_kv.plugin.requests.adapter:learn_classes",
        process=Process.SCHEDULER,
        why="the scheduler would not know the classes that requests name",
    ),
    Hook(
        target="sglang.srt.managers.schedule_batch.Req.__init__",
        kind="after",
        function="tiered_kv.plugin.requests.adapter:attach_terms",
        process=Process.SCHEDULER,
        why="the scheduler would not know what a request was promised",
    ),
    Hook(
        target="sglang.srt.managers.scheduler_components.output_streamer"
        "._GenerationStreamAccumulator.to_payload",
        kind="after",
        function="tiered_kv.plugin.requests.reports:add_reports",
        process=Process.SCHEDULER,
        why="responses would lack the report that was asked for",
    ),
    Hook(
        target="sglang.srt.managers.scheduler_components.output_streamer"
        ".SchedulerOutputStreamer.get_cached_tokens_details",
        kind="after",
        function="tiered_kv.plugin.requests.reports:tell_stores_apart",
        process=Process.SCHEDULER,
        why="what comes from the shared store would be counted as from disk",
    ),
    Hook(
        target="sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new",
        kind="after",
        function="tiered_kv.plugin.attention.cascade:plan_launched",
        process=Process.SCHEDULER,
        why="requests that share KV would each read it again for every token",
    ),
    Hook(
        target="sglang.srt.model_executor.model_runner.ModelRunner.forward",
        kind="before",
        function="tiered_kv.plugin.attention.cascade:begin_pass",
        process=Process.SCHEDULER,
        why="requests that share KV would each read it again for every token",
    ),
    *(
        Hook(
            target="sglang.srt.model_executor.runner.decode_cuda_graph_runner"
            f".DecodeCudaGraphRunner.{method}",
            kind="around",
            function=f"tiered_kv.plugin.attention.graphs:{function}",
            process=Process.SCHEDULER,
            why="requests that share KV would each read it again for every token, in a CUDA graph",
        )
        for method, function in (
            ("can_run_graph", "may_run_graph"),
            ("capture_one_shape", "capture_variants"),
            ("_resolve_lora_variant", "variant_of_pass"),
        )
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.get_internal_state",
        kind="around",
        function="tiered_kv.plugin.control.desk:answer",
        process=Process.SCHEDULER,
        why="/tiered_kv/snapshot would have nothing to show, and /tiered_kv/cache nobody to tell",
    ),
    *GUARD_HOOKS,
    *NAMING_HOOKS,
    *DRAFT_HOOKS,
    *PREFILL_HOOKS,
    *RECURRENT_HOOKS,
    *STAGES_HOOKS,
)


def _of_this_release() -> Iterator[Hook]:
    for hook in SHARED_HOOKS:
        elsewhere = targets.ELSEWHERE.get(hook.target, (hook.target, hook.function))
        if elsewhere is not None:
            target, function = elsewhere
            yield replace(hook, target=target, function=function)
    for target, kind, function, why in targets.MORE:
        yield Hook(target, kind, function, Process.SCHEDULER, why)


HOOKS = tuple(_of_this_release())
"""Those for the release that is installed."""

_installed: dict[str, Callable[..., Any]] = {}


def loaded_processes() -> tuple[Process, ...]:
    """The kinds of process that this one can be, judged by the modules it has loaded."""
    return tuple(process for process in Process if process.value in sys.modules)


def install(processes: Iterable[Process]) -> None:
    """Apply the hooks of `processes` that are not applied yet, importing their targets.

    Raises UpstreamError if one cannot be applied.
    """
    wanted = set(processes)
    by_target: dict[str, list[Hook]] = {}
    for hook in HOOKS:
        if hook.process in wanted and hook.target not in _installed:
            by_target.setdefault(hook.target, []).append(hook)
    for target, hooks in by_target.items():
        _apply(target, hooks)


def verify_installed(process: Process) -> None:
    """Raise UpstreamError unless every hook of `process` is in effect in this very process."""
    for hook in HOOKS:
        if hook.process is process and not _in_effect(hook.target):
            raise UpstreamError(
                f"--tiered-kv refuses to start because its hook on {hook.target} is not in effect "
                f"({hook.why}); another plugin may have replaced it: try SGLANG_PLUGINS=tiered_kv."
            )


def _apply(target: str, hooks: list[Hook]) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

    source = HookSource(plugin_name="tiered_kv", dist_name="sglang-tiered-kv")
    try:
        entries = [(HookType(hook.kind), _function(hook), source) for hook in hooks]
        HookRegistry._apply_target(target, entries)
        _installed[target] = _current(target)
    except Exception as error:
        raise UpstreamError(
            f"--tiered-kv refuses to start because {target} cannot be hooked "
            f"({type(error).__name__}: {error}); install the supported SGLang release or start "
            "without the flag."
        ) from error


def _function(hook: Hook) -> Callable[..., Any]:
    module, _, name = hook.function.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def _current(target: str) -> Callable[..., Any]:
    owner, _, name = target.rpartition(".")
    return _plain(vars(pkgutil.resolve_name(owner))[name])


def _in_effect(target: str) -> bool:
    """Whether calling `target` still runs through our wrapper, under whatever wraps it by now."""
    ours = _installed.get(target)
    if ours is None:
        return False
    owner_name, _, name = target.rpartition(".")
    owner = pkgutil.resolve_name(owner_name)
    # A class that replaced the hooked one inherits our wrapper or calls it through super().
    places = owner.__mro__ if isinstance(owner, type) else (owner,)
    for place in places:
        function = _plain(vars(place).get(name))
        while function is not None:
            if function is ours:
                return True
            function = getattr(function, "__wrapped__", None)
    return False


def _plain(function: Any) -> Any:
    return function.__func__ if isinstance(function, classmethod | staticmethod) else function
