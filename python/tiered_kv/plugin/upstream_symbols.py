"""The table of what the plugin uses of SGLang 0.5.17; `upstream.py` checks it.

`docs/upstream_contract.md` tells what each is used for. Whoever imports, calls, overrides or reads
something more of SGLang's adds it here and there; test/contract holds the three together.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Symbol:
    """One name of SGLang's that we import, call, override or read."""

    name: str
    """Dotted name; the longest importable part is the module."""
    users: tuple[str, ...]
    """Modules of `tiered_kv.plugin` that need it."""
    parameters: tuple[str, ...] | None = None
    """Of a function: the exact names of its parameters. None: not checked."""
    attributes: tuple[str, ...] = ()
    """Of a class: names it defines, declares as fields, or that a method sets on `self`."""


def _function(name: str, parameters: str, users: str) -> Symbol:
    return Symbol(name, tuple(users.split()), tuple(parameters.split()))


def _object(name: str, attributes: str, users: str) -> Symbol:
    return Symbol(name, tuple(users.split()), attributes=tuple(attributes.split()))


def _methods(owner: str, users: str, **parameters: str) -> tuple[Symbol, ...]:
    return tuple(
        _function(f"{owner}.{name}", f"self {text}", users) for name, text in parameters.items()
    )


_SRT = "sglang.srt"
_MEM = "sglang.srt.mem_cache"
_RECEIVER = "sglang.srt.managers.scheduler_components.request_receiver.SchedulerRequestReceiver"
_STREAM = "sglang.srt.managers.scheduler_components.output_streamer._GenerationStreamAccumulator"
_UPDATER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"

PLUGIN_SYSTEM = (
    _object("sglang.version.__version__", "", "upstream"),
    _function(f"{_SRT}.plugins.load_plugins", "", "process_carrier"),
    _object(f"{_SRT}.plugins.hook_registry.HookRegistry", "", "entry hooks"),
    _function(
        f"{_SRT}.plugins.hook_registry.HookRegistry.register",
        "target hook hook_type source",
        "entry",
    ),
    _function(f"{_SRT}.plugins.hook_registry.HookRegistry._apply_target", "target hooks", "hooks"),
    _object(f"{_SRT}.plugins.hook_registry.HookType", "BEFORE AFTER AROUND REPLACE", "entry hooks"),
    _object(f"{_SRT}.plugins.hook_registry.HookSource", "plugin_name dist_name", "hooks"),
)

ARGUMENTS = (
    _object(
        f"{_SRT}.server_args.ServerArgs",
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
        "hicache_storage_prefetch_policy device chunked_prefill_size model_path served_model_name",
        "server_args refusals unavailable build",
    ),
    _function(f"{_SRT}.server_args.ServerArgs.add_cli_args", "parser", "server_args unavailable"),
    _function(f"{_SRT}.server_args.ServerArgs.from_cli_args", "args", "server_args"),
    _function(f"{_SRT}.server_args.ServerArgs.__post_init__", "self", "server_args"),
    _object(f"{_SRT}.arg_groups.arg_utils.A", "", "server_args"),
    _object(f"{_SRT}.arg_groups.arg_utils.Arg", "help type_parser no_cli", "server_args"),
    _object(f"{_SRT}.arg_groups.arg_utils.NS", "path", "server_args"),
    _object(f"{_SRT}.entrypoints.engine.Engine", "server_args_class", "entry"),
    _object(
        f"{_SRT}.environ.envs",
        "SGLANG_EXPERIMENTAL_CPP_RADIX_TREE SGLANG_ENABLE_UNIFIED_RADIX_TREE",
        "refusals",
    ),
)

SCHEDULER = (
    _function(
        f"{_SRT}.managers.detokenizer_manager.DetokenizerManager.__init__",
        "self server_args port_args",
        "interrupts",
    ),
    _function(
        f"{_SRT}.managers.scheduler.Scheduler.__init__",
        "self server_args port_args gpu_id tp_rank moe_ep_rank pp_rank attn_cp_rank moe_dp_rank "
        "dp_rank",
        "scheduler_hooks",
    ),
    _object(
        f"{_SRT}.managers.scheduler.Scheduler",
        "server_args tree_cache enable_hicache_storage enable_hierarchical_cache "
        "clear_hicache_storage_wrapped flush_cache",
        "scheduler_hooks prefix_cache",
    ),
    _function(f"{_SRT}.managers.scheduler.Scheduler.on_idle", "self", "scheduler_hooks"),
    _function(
        f"{_SRT}.managers.scheduler.Scheduler.run_batch",
        "self batch pp_proxy_tensors",
        "step_times",
    ),
    _function(
        f"{_SRT}.managers.scheduler.Scheduler.process_batch_result",
        "self batch result",
        "step_times",
    ),
    _object(
        f"{_SRT}.managers.schedule_batch.ScheduleBatch",
        "forward_mode launch_ts extend_lens prefix_lens hicache_consumer_index decoding_reqs reqs",
        "step_times",
    ),
    _object(
        f"{_SRT}.model_executor.forward_batch_info.ForwardMode",
        "is_extend is_mixed is_decode",
        "step_times",
    ),
    _object("sglang.srt.managers.tokenizer_manager.TokenizerManager", "server_args", "hooks"),
    _object(
        "sglang.srt.managers.detokenizer_manager.run_detokenizer_process", "", "process_carrier"
    ),
    *(
        _function(f"{_UPDATER}.update_weights_from_{kind}", "self recv_req", "weight_updates")
        for kind in ("disk", "distributed", "tensor", "ipc")
    ),
    _function(f"{_UPDATER}.flush_cache_after_weight_update", "self recv_req", "weight_updates"),
)

QUEUE = (
    *_methods(
        f"{_SRT}.managers.scheduler.Scheduler",
        "scheduler_hooks request_order",
        _get_new_batch_prefill_raw="prefill_delayer_single_pass running_batch",
        _add_request_to_queue="req is_retracted",
    ),
    _object(
        f"{_SRT}.managers.scheduler.Scheduler",
        "waiting_queue policy chunked_req chunked_prefill_size max_prefill_tokens page_size "
        "is_mixed_chunk request_receiver load_inquirer",
        "scheduler_hooks request_order",
    ),
    _function(
        f"{_SRT}.managers.schedule_policy.SchedulePolicy.calc_priority",
        "self waiting_queue running_batch",
        "scheduler_hooks",
    ),
    _function(
        f"{_RECEIVER}._broadcast_reqs_across_ranks",
        "self recv_reqs",
        "clock_tick",
    ),
    _function(
        f"{_SRT}.managers.scheduler_components.load_inquirer.SchedulerLoadInquirer"
        "._get_num_pending_tokens",
        "self chunk_deduct",
        "request_order",
    ),
    _object(
        f"{_SRT}.managers.schedule_batch.ScheduleBatch",
        "reqs batch_is_full extend_num_tokens prefill_stats tree_cache",
        "request_order scheduler_hooks",
    ),
    *_methods(
        f"{_SRT}.managers.schedule_batch.ScheduleBatch",
        "request_order scheduler_hooks",
        prepare_for_extend="",
        check_decode_mem="selected_indices",
    ),
    _object(
        f"{_SRT}.managers.schedule_batch.Req",
        "rid origin_input_ids output_ids extra_key sampling_params priority finished to_finish "
        "finished_reason prefix_indices extend_range positional_embed_overrides input_embeds",
        "queued_requests request_order prefix_cache",
    ),
    _object(
        f"{_SRT}.managers.schedule_batch.Req",
        "return_logprob inflight_middle_chunks retraction_count retracted_stain",
        "parking",
    ),
    _function(f"{_SRT}.managers.schedule_batch.Req.reset_for_retract", "self", "parking"),
    _function(f"{_MEM}.common.release_kv_cache", "req tree_cache is_insert", "parking"),
    _object(f"{_SRT}.managers.schedule_batch.FINISH_ABORT", "", "queued_requests"),
    _object(f"{_SRT}.constants.HEALTH_CHECK_RID_PREFIX", "", "queued_requests"),
    _object(f"{_SRT}.managers.io_struct.TokenizedGenerateReqInput", "rid time_stats", "clock_tick"),
    _object(f"{_SRT}.managers.io_struct.BatchTokenizedGenerateReqInput", "batch", "clock_tick"),
    _function(f"{_SRT}.managers.io_struct.unwrap_from_pickle", "obj", "clock_tick"),
    _object(
        f"{_SRT}.observability.req_time_stats.APIServerReqTimeStats", "created_time", "clock_tick"
    ),
    _function(
        f"{_SRT}.observability.req_time_stats.APIServerReqTimeStats.__getstate__",
        "self",
        "clock_tick",
    ),
)

FRONT_ENDS = (
    _function(
        f"{_SRT}.managers.tokenizer_manager.TokenizerManager.generate_request",
        "self obj request",
        "request_adapter",
    ),
    _object(
        f"{_SRT}.managers.tokenizer_manager.TokenizerManager",
        "preferred_sampling_params",
        "request_adapter",
    ),
    _object(
        f"{_SRT}.managers.io_struct.GenerateReqInput",
        "sampling_params batch_size parallel_sample_num",
        "request_adapter openai_responses",
    ),
    _function(f"{_SRT}.entrypoints.http_server.ORJSONRequest.json", "self", "request_adapter"),
    _function(f"{_SRT}.entrypoints.http_server.get_global_state", "", "request_adapter"),
    _object(f"{_SRT}.entrypoints.engine.Engine.generate", "", "request_adapter"),
    _object(f"{_SRT}.entrypoints.engine.Engine.async_generate", "", "request_adapter"),
    *_methods(
        f"{_SRT}.entrypoints.openai.serving_chat.OpenAIServingChat",
        "openai_responses",
        _build_chat_response="request ret created",
        _generate_chat_stream="adapted_request request raw_request",
    ),
    *_methods(
        f"{_SRT}.entrypoints.openai.serving_completions.OpenAIServingCompletion",
        "openai_responses",
        _build_completion_response="request ret created",
        _generate_completion_stream="adapted_request request raw_request",
    ),
    _object(f"{_SRT}.managers.schedule_batch.Req.__init__", "", "request_adapter"),
    _object(
        f"{_SRT}.managers.schedule_batch.Req",
        "sampling_params time_stats",
        "request_adapter request_reports",
    ),
    _object(f"{_SRT}.sampling.sampling_params.SamplingParams", "custom_params", "request_adapter"),
    _object(
        f"{_SRT}.observability.req_time_stats.SchedulerReqTimeStats",
        "wait_queue_entry_time forward_entry_time prefill_finished_time",
        "request_reports",
    ),
    _function(f"{_STREAM}.to_payload", "self dp_rank is_idle_batch", "request_reports"),
    _object(_STREAM, "rust_server_mode", "request_reports"),
    _object(
        f"{_SRT}.managers.io_struct.BatchTokenIDOutput", "rids finished_reasons", "request_reports"
    ),
)

CACHE_INTERFACE = (
    _function(f"{_MEM}.registry.register_radix_cache_backend", "name factory", "process_carrier"),
    _function(f"{_MEM}.registry.get_radix_cache_factory", "name", "process_carrier"),
    _object(
        f"{_MEM}.registry.TreeCacheBuildContext",
        "server_args params is_hybrid_swa is_hybrid_ssm is_dsa disable_radix_cache tp_worker "
        "model_config tp_size tp_rank",
        "build refusals",
    ),
    _object(
        f"{_MEM}.cache_init_params.CacheInitParams",
        "page_size token_to_kv_pool_allocator req_to_token_pool tp_cache_group enable_metrics "
        "enable_kv_cache_events disable",
        "build prefix_cache refusals",
    ),
    _object(f"{_MEM}.radix_cache.RadixCache", "device token_to_kv_pool_allocator", "prefix_cache"),
    _object(f"{_MEM}.radix_cache.RadixKey", "token_ids extra_key limit", "prefix_cache"),
    *_methods(
        f"{_MEM}.radix_cache.RadixCache",
        "prefix_cache",
        __init__="params",
        match_prefix="params",
        insert="params",
        cache_finished_req="req is_insert kv_len_to_handle",
        cache_unfinished_req="req chunked",
        evict="params",
        inc_lock_ref="node",
        dec_lock_ref="node params",
        evictable_size="",
        protected_size="",
        total_size="",
        all_values_flatten="",
        reset="",
        take_events="",
        pretty_print="",
        root_node_handle="extra_key",
        resolve_node_handle="node_handle",
        is_root="node",
        is_backuped="node",
        get_last_hash_value="node",
        init_load_back="params",
        ready_to_load_host_cache="",
        check_hicache_events="",
        release_host_resources="",
        update_eviction_metrics="num_evicted start_time",
    ),
    # Defined by HiRadixCache alone: this is the shape that the scheduler calls.
    *_methods(
        f"{_MEM}.hiradix_cache.HiRadixCache",
        "prefix_cache",
        prefetch_from_storage="req_id last_host_node new_input_tokens last_hash prefix_keys",
        check_prefetch_progress="req_id",
        pop_prefetch_loaded_tokens="req_id",
        terminate_prefetch="req_id",
        release_aborted_request="rid",
        clear_storage_backend="",
        attach_storage_backend="storage_backend storage_backend_extra_config_json "
        "served_model_name hicache_storage_prefetch_policy hicache_write_policy",
        detach_storage_backend="",
    ),
    *(
        _object(f"{_MEM}.base_prefix_cache.{name}", fields, "prefix_cache")
        for name, fields in {
            "MatchPrefixParams": "key cow_mamba req",
            "MatchResult": "device_indices last_device_node last_host_node best_match_node "
            "host_hit_length cache_protected_len",
            "InsertParams": "key value priority chunked",
            "InsertResult": "prefix_len last_device_node",
            "EvictParams": "num_tokens",
            "EvictResult": "num_tokens_evicted",
            "IncLockRefResult": "to_dec_params",
            "DecLockRefParams": "",
            "DecLockRefResult": "",
            "InitLoadBackParams": "best_match_node host_hit_length mem_quota req",
        }.items()
    ),
)

POOLS = (
    _object(
        f"{_MEM}.memory_pool.MHATokenToKVPool",
        "k_buffer v_buffer kv_cache_layout is_quantized_kv_cache quant_method dtype store_dtype "
        "size register_layer_transfer_counter",
        "device_pool build refusals platform_adapter",
    ),
    _object(
        f"{_MEM}.memory_pool.MLATokenToKVPool",
        "kv_buffer dtype store_dtype size register_layer_transfer_counter",
        "device_pool build refusals platform_adapter",
    ),
    _object(
        f"{_MEM}.allocator.base.BaseTokenToKVPoolAllocator",
        "get_kvcache available_size alloc size",
        "device_pool build refusals prefix_cache",
    ),
    _function(
        f"{_MEM}.allocator.base.BaseTokenToKVPoolAllocator.free_segment",
        "self free_index start_pos",
        "device_pool",
    ),
    _function(
        f"{_SRT}.managers.tp_worker.TpModelWorker.register_hicache_layer_transfer_counter",
        "self counter",
        "build",
    ),
    _object(
        f"{_SRT}.configs.model_config.ModelConfig",
        "hf_config context_len is_multimodal is_encoder_decoder is_generation dtype",
        "fingerprint refusals costs",
    ),
    _object(f"{_SRT}.managers.tp_worker.TpModelWorker", "model_runner", "build"),
    _object(f"{_SRT}.model_executor.model_runner.ModelRunner", "model forward_stream", "build"),
)

REQUESTS_AND_EVENTS = (
    _object(
        f"{_SRT}.managers.schedule_batch.Req",
        "rid origin_input_ids output_ids host_hit_length cached_tokens_device cached_tokens_host "
        "cached_tokens_storage",
        "prefix_cache metrics_adapter",
    ),
    _object(
        f"{_SRT}.disaggregation.kv_events.BlockStored",
        "block_hashes parent_block_hash token_ids block_size lora_id medium",
        "kv_events",
    ),
    _object(f"{_SRT}.disaggregation.kv_events.BlockRemoved", "block_hashes medium", "kv_events"),
    _object(f"{_SRT}.disaggregation.kv_events.AllBlocksCleared", "", "kv_events"),
    _object(f"{_SRT}.disaggregation.kv_events.StorageMedium", "GPU CPU DISK EXTERNAL", "kv_events"),
)

CPU_PLATFORM = (
    _object(
        f"{_MEM}.allocator.paged.PagedTokenToKVPoolAllocator",
        "page_size debug_mode need_sort free_pages",
        "cpu_allocator",
    ),
    *_methods(
        f"{_MEM}.allocator.paged.PagedTokenToKVPoolAllocator",
        "cpu_allocator",
        alloc_extend="prefix_lens prefix_lens_cpu seq_lens seq_lens_cpu last_loc "
        "extend_num_tokens num_new_pages",
        alloc_decode="seq_lens seq_lens_cpu last_loc",
        merge_and_sort_free="",
    ),
    _object(f"{_SRT}.platforms.cpu.CpuDeviceMixin", "", "platform_adapter"),
    _object(f"{_SRT}.platforms.device_mixin.PlatformEnum", "OOT", "platform_adapter"),
    _function(
        f"{_SRT}.layers.attention.attention_registry.register_attention_backend",
        "name",
        "cpu_attention",
    ),
    _function(
        f"{_SRT}.layers.attention.torch_native_backend.TorchNativeAttnBackend.__init__",
        "self model_runner",
        "cpu_attention",
    ),
    _function(
        f"{_SRT}.layers.attention.torch_native_backend.TorchNativeAttnBackend"
        "._run_sdpa_forward_extend",
        "self query output k_cache v_cache req_to_token req_pool_indices seq_lens "
        "extend_prefix_lens extend_seq_lens encoder_lens scaling enable_gqa causal is_cross_attn "
        "sliding_window_size",
        "cpu_attention",
    ),
    _object(f"{_SRT}.platforms.interface.SRTPlatform", "", "platform_adapter"),
    *_methods(
        f"{_SRT}.platforms.interface.SRTPlatform",
        "platform_adapter",
        apply_server_args_defaults="server_args",
        get_default_attention_backend="",
        init_backend="",
        get_mha_kv_pool_cls="",
        get_mla_kv_pool_cls="",
        get_paged_allocator_cls="",
    ),
)

SYMBOLS: tuple[Symbol, ...] = (
    *PLUGIN_SYSTEM,
    *ARGUMENTS,
    *SCHEDULER,
    *QUEUE,
    *FRONT_ENDS,
    *CACHE_INTERFACE,
    *POOLS,
    *REQUESTS_AND_EVENTS,
    *CPU_PLATFORM,
)
