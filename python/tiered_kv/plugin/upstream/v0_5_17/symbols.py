"""The table of what the plugin uses of SGLang 0.5.17; `upstream.py` checks it.

`docs/upstream_contract.md` tells what each is used for. Whoever imports, calls, overrides or reads
something more of SGLang's adds it here, or in the part for its subsystem, and there; test/contract
holds the three together.
"""

from __future__ import annotations

from tiered_kv.plugin.upstream.symbol import SRT, Symbol, function, methods, object_
from tiered_kv.plugin.upstream.v0_5_17.symbols_administration import ADMINISTRATION
from tiered_kv.plugin.upstream.v0_5_17.symbols_attention import ATTENTION
from tiered_kv.plugin.upstream.v0_5_17.symbols_cache import (
    ADAPTERS,
    CACHE_INTERFACE,
    POOLS,
    REQUESTS_AND_EVENTS,
)
from tiered_kv.plugin.upstream.v0_5_17.symbols_disaggregation import DISAGGREGATION
from tiered_kv.plugin.upstream.v0_5_17.symbols_guard import GUARD
from tiered_kv.plugin.upstream.v0_5_17.symbols_pipeline import PIPELINE
from tiered_kv.plugin.upstream.v0_5_17.symbols_platform import CPU_PLATFORM
from tiered_kv.plugin.upstream.v0_5_17.symbols_recurrent import RECURRENT
from tiered_kv.plugin.upstream.v0_5_17.symbols_scheduler import DECODE, QUEUE, SCHEDULER
from tiered_kv.plugin.upstream.v0_5_17.symbols_snapshots import SNAPSHOTS
from tiered_kv.plugin.upstream.v0_5_17.symbols_speculation import SPECULATION

_OPTIONS = (
    "start.server_args options.tiers options.store options.policies options.overlap "
    "options.callers options.control options.watching"
)
_ARGUMENTS = "upstream.v0_5_17.arguments"
_OUTPUT = "sglang.srt.managers.scheduler_components.output_streamer"
_STREAM = f"{_OUTPUT}._GenerationStreamAccumulator"

PLUGIN_SYSTEM = (
    object_("sglang.version.__version__", "", "upstream.installed cache.build"),
    function(f"{SRT}.plugins.load_plugins", "", "start.process_carrier"),
    object_(f"{SRT}.plugins.hook_registry.HookRegistry", "", "start.entry hooks.table"),
    function(
        f"{SRT}.plugins.hook_registry.HookRegistry.register",
        "target hook hook_type source",
        "start.entry",
    ),
    function(
        f"{SRT}.plugins.hook_registry.HookRegistry._apply_target", "target hooks", "hooks.table"
    ),
    object_(
        f"{SRT}.plugins.hook_registry.HookType",
        "BEFORE AFTER AROUND REPLACE",
        "start.entry hooks.table",
    ),
    object_(f"{SRT}.plugins.hook_registry.HookSource", "plugin_name dist_name", "hooks.table"),
)

ARGUMENTS = (
    object_(
        f"{SRT}.server_args.ServerArgs",
        # What `server_args.py` sets or reads.
        "radix_cache_backend enable_hierarchical_cache enable_cache_report page_size tp_size "
        "nnodes hicache_io_backend hicache_mem_layout disable_radix_cache radix_eviction_policy "
        # What `refusals.py` reads.
        "speculative_algorithm decoupled_spec_role pp_size dp_size enable_dp_attention "
        "attn_cp_size dcp_size enable_prefill_cp dwdp_size elastic_ep_backend disaggregation_mode "
        "enable_pdmux encoder_only language_only use_ray enable_lmcache enable_flexkv "
        "enable_hisparse enable_unified_memory enable_page_major_kv_layout "
        "enable_session_radix_cache enable_streaming_session dllm_algorithm is_embedding "
        "enable_return_routed_experts enable_return_indexer_topk "
        "schedule_policy kv_canary hicache_size hicache_ratio hicache_write_policy "
        "hicache_storage_backend hicache_storage_backend_extra_config "
        "hicache_storage_prefetch_policy device chunked_prefill_size model_path served_model_name "
        "cuda_graph_config disable_overlap_schedule disable_hybrid_swa_memory",
        "start.server_args options.policies options.refusals options.windows start.unavailable "
        "cache.build cache.replicas",
    ),
    function(
        f"{SRT}.configs.model_config.is_hybrid_swa_model",
        "model_architectures hf_text_config",
        "options.windows",
    ),
    object_(
        f"{SRT}.configs.model_config.ModelConfig",
        "hf_config hf_text_config is_hybrid_swa_compress has_asymmetric_kv",
        "options.windows",
    ),
    function(
        f"{SRT}.server_args.ServerArgs.add_cli_args",
        "parser",
        f"{_ARGUMENTS} start.unavailable",
    ),
    function(f"{SRT}.server_args.ServerArgs.from_cli_args", "args", _ARGUMENTS),
    function(f"{SRT}.server_args.ServerArgs.__post_init__", "self", _ARGUMENTS),
    object_(
        f"{SRT}.arg_groups.arg_utils.A",
        "",
        _OPTIONS,
    ),
    object_(
        f"{SRT}.arg_groups.arg_utils.Arg",
        "help type_parser no_cli",
        _OPTIONS,
    ),
    object_(
        f"{SRT}.arg_groups.arg_utils.NS",
        "path",
        _OPTIONS,
    ),
    object_(
        f"{SRT}.entrypoints.engine.Engine", "server_args_class", "start.entry start.unavailable"
    ),
    object_(
        f"{SRT}.environ.envs",
        "SGLANG_EXPERIMENTAL_CPP_RADIX_TREE SGLANG_ENABLE_UNIFIED_RADIX_TREE "
        "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING",
        "options.refusals",
    ),
)

FRONT_ENDS = (
    function(
        f"{SRT}.managers.tokenizer_manager.TokenizerManager.generate_request",
        "self obj request",
        "requests.adapter",
    ),
    *methods(
        f"{SRT}.managers.tokenizer_manager.TokenizerManager",
        "requests.choices",
        _handle_batch_request="obj request",
        _wait_one_response="obj request",
    ),
    object_(
        f"{SRT}.managers.tokenizer_manager.TokenizerManager",
        "preferred_sampling_params",
        "requests.adapter",
    ),
    object_(
        f"{SRT}.managers.io_struct.GenerateReqInput",
        "sampling_params batch_size parallel_sample_num extra_key received_time",
        "requests.adapter requests.choices requests.openai_responses requests.salts",
    ),
    function(
        f"{SRT}.entrypoints.openai.serving_base.OpenAIServingBase._compute_extra_key",
        "self request",
        "requests.salts",
    ),
    function(f"{SRT}.entrypoints.http_server.ORJSONRequest.json", "self", "requests.adapter"),
    function(
        f"{SRT}.entrypoints.http_server._setup_and_run_http_server",
        "server_args tokenizer_manager template_manager port_args scheduler_infos "
        "subprocess_watchdog execute_warmup_func launch_callback",
        "start.interrupts",
    ),
    function(
        f"{SRT}.entrypoints.http_server.get_global_state", "", "requests.adapter prompts.endpoint"
    ),
    object_(f"{SRT}.entrypoints.engine.Engine.generate", "", "requests.adapter"),
    object_(f"{SRT}.entrypoints.engine.Engine.async_generate", "", "requests.adapter"),
    *methods(
        f"{SRT}.entrypoints.openai.serving_chat.OpenAIServingChat",
        "requests.openai_responses",
        _build_chat_response="request ret created",
        _generate_chat_stream="adapted_request request raw_request",
    ),
    *methods(
        f"{SRT}.entrypoints.openai.serving_completions.OpenAIServingCompletion",
        "requests.openai_responses",
        _build_completion_response="request ret created",
        _generate_completion_stream="adapted_request request raw_request",
    ),
    object_(f"{SRT}.managers.schedule_batch.Req.__init__", "", "requests.adapter"),
    object_(
        f"{SRT}.managers.schedule_batch.Req",
        "sampling_params time_stats",
        "requests.adapter requests.reports",
    ),
    object_(f"{SRT}.sampling.sampling_params.SamplingParams", "custom_params", "requests.adapter"),
    object_(
        f"{SRT}.observability.req_time_stats.SchedulerReqTimeStats",
        "wait_queue_entry_time forward_entry_time prefill_finished_time",
        "requests.reports",
    ),
    function(f"{_STREAM}.to_payload", "self dp_rank is_idle_batch", "requests.reports"),
    object_(_STREAM, "rust_server_mode", "requests.reports"),
    function(
        f"{_OUTPUT}.SchedulerOutputStreamer.get_cached_tokens_details",
        "self req",
        "requests.reports",
    ),
    object_(f"{_OUTPUT}.SchedulerOutputStreamer", "tree_cache", "requests.reports"),
    object_(
        f"{SRT}.managers.io_struct.BatchTokenIDOutput", "rids finished_reasons", "requests.reports"
    ),
)

#: Modules of ours that are not loaded on this release.
UNUSED_MODULES: tuple[str, ...] = ()

SYMBOLS: tuple[Symbol, ...] = (
    *PLUGIN_SYSTEM,
    *ARGUMENTS,
    *SCHEDULER,
    *QUEUE,
    *DECODE,
    *ADMINISTRATION,
    *FRONT_ENDS,
    *CACHE_INTERFACE,
    *POOLS,
    *ADAPTERS,
    *REQUESTS_AND_EVENTS,
    *CPU_PLATFORM,
    *ATTENTION,
    *GUARD,
    *SNAPSHOTS,
    *RECURRENT,
    *DISAGGREGATION,
    *SPECULATION,
    *PIPELINE,
)
