"""What is used of SGLang 0.5.17's caches: the prefix cache, memory pools, allocators, events."""

from __future__ import annotations

from tiered_kv.plugin.upstream.symbol import MEM, SRT, function, methods, object_

CACHE_INTERFACE = (
    function(
        f"{MEM}.registry.register_radix_cache_backend", "name factory", "start.process_carrier"
    ),
    function(f"{MEM}.registry.get_radix_cache_factory", "name", "start.process_carrier"),
    object_(
        f"{MEM}.registry.TreeCacheBuildContext",
        "server_args params is_hybrid_swa is_hybrid_ssm is_dsa disable_radix_cache tp_worker "
        "model_config tp_size tp_rank",
        "cache.build options.refusals",
    ),
    object_(
        f"{MEM}.cache_init_params.CacheInitParams",
        "page_size token_to_kv_pool_allocator req_to_token_pool tp_cache_group enable_metrics "
        "enable_kv_cache_events disable",
        "cache.build cache.prefix_cache options.refusals",
    ),
    object_(
        f"{MEM}.radix_cache.RadixCache",
        "device token_to_kv_pool_allocator req_to_token_pool",
        "cache.prefix_cache upstream.v0_5_17.cache_contract",
    ),
    object_(f"{MEM}.radix_cache.RadixKey", "token_ids extra_key limit", "cache.prefix_cache"),
    *methods(
        f"{MEM}.radix_cache.RadixCache",
        "cache.prefix_cache upstream.v0_5_17.cache_contract",
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
    *methods(
        f"{MEM}.hiradix_cache.HiRadixCache",
        "upstream.v0_5_17.cache_contract",
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
        object_(
            f"{MEM}.base_prefix_cache.{name}",
            fields,
            "cache.prefix_cache upstream.v0_5_17.cache_contract cache.placed_cache "
            "cache.window_cache",
        )
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
    object_(
        f"{MEM}.memory_pool.MHATokenToKVPool",
        "k_buffer v_buffer kv_cache_layout is_quantized_kv_cache quant_method dtype store_dtype "
        "size register_layer_transfer_counter layer_num start_layer",
        "cache.device_pool cache.build cache.build_windows options.refusals "
        "upstream.v0_5_17.hardware",
    ),
    object_(
        f"{MEM}.memory_pool.MLATokenToKVPool",
        "kv_buffer dtype store_dtype size register_layer_transfer_counter",
        "cache.device_pool cache.build cache.shards options.refusals upstream.v0_5_17.hardware",
    ),
    object_(f"{SRT}.layers.linear.QKVParallelLinear", "num_kv_head_replicas", "cache.shards"),
    object_(
        f"{SRT}.layers.radix_attention.RadixAttention",
        "layer_id sliding_window_size",
        "cache.shards cache.build_windows",
    ),
    object_(
        f"{MEM}.hicache_storage.HiCacheStorageConfig",
        "tp_rank tp_size pp_rank pp_size attn_cp_rank attn_cp_size is_mla_model "
        "enable_storage_metrics is_page_first_layout model_name extra_config",
        "cache.hicache",
    ),
    function(
        f"{MEM}.storage.StorageBackendFactory.create_backend",
        "backend_name storage_config mem_pool_host kwargs",
        "cache.hicache",
    ),
    object_(
        f"{MEM}.allocator.base.BaseTokenToKVPoolAllocator",
        "get_kvcache available_size alloc size",
        "cache.device_pool cache.build options.refusals cache.prefix_cache",
    ),
    function(
        f"{MEM}.allocator.base.BaseTokenToKVPoolAllocator.free_segment",
        "self free_index start_pos",
        "cache.device_pool",
    ),
    function(
        f"{SRT}.managers.tp_worker.TpModelWorker.register_hicache_layer_transfer_counter",
        "self counter",
        "cache.build",
    ),
    object_(
        f"{SRT}.configs.model_config.ModelConfig",
        "hf_config hf_text_config context_len is_multimodal is_encoder_decoder is_generation dtype "
        "quantization get_total_num_kv_heads",
        "cache.fingerprint cache.build cache.shards options.refusals cache.costs",
    ),
    function(
        f"{SRT}.server_args.ServerArgs.get_attention_backends",
        "self",
        "upstream.v0_5_17.arguments",
    ),
    object_(
        f"{SRT}.server_args.ServerArgs",
        "enable_deterministic_inference rl_on_policy_target",
        "cache.fingerprint",
    ),
    object_(
        f"{SRT}.managers.tp_worker.TpModelWorker", "model_runner", "cache.build decode.selection"
    ),
    object_(f"{SRT}.managers.tp_worker.TpModelWorker", "ps", "upstream.v0_5_17.hardware"),
    object_(
        f"{SRT}.distributed.parallel_state_wrapper.ParallelState",
        "dp_rank",
        "upstream.v0_5_17.hardware",
    ),
    object_(
        f"{SRT}.model_executor.model_runner.ModelRunner",
        "model forward_stream lora_manager",
        "cache.build",
    ),
)

ADAPTERS = (
    object_(
        f"{SRT}.lora.lora_manager.LoRAManager",
        "loras target_modules experts_shared_outer_loras",
        "cache.adapters",
    ),
    object_(
        f"{SRT}.lora.lora.LoRAAdapter",
        "config scaling layers embedding_layers added_tokens_embeddings",
        "cache.adapters",
    ),
    object_(f"{SRT}.lora.lora.LoRALayer", "weights", "cache.adapters"),
    object_(
        f"{SRT}.lora.lora_config.LoRAConfig", "hf_config added_tokens_config", "cache.adapters"
    ),
    function(
        f"{SRT}.lora.utils.get_target_module_name",
        "full_module_name target_modules",
        "cache.adapters",
    ),
    *methods(
        f"{SRT}.managers.scheduler.Scheduler",
        "cache.adapters",
        load_lora_adapter="recv_req",
        load_lora_adapter_from_tensors="recv_req",
        unload_lora_adapter="recv_req",
    ),
    *(
        object_(f"{SRT}.managers.io_struct.{name}ReqInput", "lora_id", "cache.adapters")
        for name in ("LoadLoRAAdapter", "LoadLoRAAdapterFromTensors", "UnloadLoRAAdapter")
    ),
    object_(f"{SRT}.managers.schedule_batch.Req", "extra_key lora_id", "cache.adapters"),
    object_(
        f"{SRT}.managers.schedule_batch.Req",
        "extra_key multimodal_inputs origin_input_ids",
        "requests.inputs requests.view",
    ),
    object_(
        f"{SRT}.managers.schedule_batch.MultimodalInputs",
        "mm_items mrope_positions",
        "requests.inputs",
    ),
    object_(
        f"{SRT}.managers.schedule_batch.MultimodalDataItem",
        "modality format feature precomputed_embeddings model_specific_data offsets hash pad_value",
        "requests.inputs upstream.v0_5_17.request_kv",
    ),
    *methods(
        f"{SRT}.managers.schedule_batch.MultimodalDataItem",
        "requests.inputs upstream.v0_5_17.request_kv",
        set_pad_value="",
        set_hash="hash_value",
    ),
    object_(f"{SRT}.managers.schedule_batch.MM_PAD_SHIFT_VALUE", "", "requests.inputs"),
    object_(f"{SRT}.managers.mm_utils.embedding_cache", "", "upstream.v0_5_17.cache_contract"),
)

REQUESTS_AND_EVENTS = (
    object_(
        f"{SRT}.managers.schedule_batch.Req",
        "rid origin_input_ids output_ids output_ids_through_stop last_node host_hit_length "
        "storage_hit_length "
        "cached_tokens_device cached_tokens_host cached_tokens_storage",
        "cache.prefix_cache cache.metrics_adapter queue.queued",
    ),
    object_(
        f"{SRT}.disaggregation.kv_events.BlockStored",
        "block_hashes parent_block_hash token_ids block_size lora_id medium",
        "cache.events",
    ),
    object_(f"{SRT}.disaggregation.kv_events.BlockRemoved", "block_hashes medium", "cache.events"),
    object_(f"{SRT}.disaggregation.kv_events.AllBlocksCleared", "", "cache.events"),
    object_(
        f"{SRT}.disaggregation.kv_events.StorageMedium", "GPU CPU DISK EXTERNAL", "cache.events"
    ),
)
