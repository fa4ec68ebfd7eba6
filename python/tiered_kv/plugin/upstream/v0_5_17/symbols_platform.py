"""What is used of SGLang 0.5.17 to serve on a CPU, and of its attention backends."""

from __future__ import annotations

from tiered_kv.plugin.upstream.symbol import MEM, SRT, function, methods, object_

DEEPSEEK = f"{SRT}.models.deepseek_common"

CPU_PLATFORM = (
    object_(
        f"{MEM}.allocator.paged.PagedTokenToKVPoolAllocator",
        "page_size debug_mode need_sort free_pages",
        "upstream.v0_5_17.cpu_allocator",
    ),
    *methods(
        f"{MEM}.allocator.paged.PagedTokenToKVPoolAllocator",
        "upstream.v0_5_17.cpu_allocator",
        alloc_extend="prefix_lens prefix_lens_cpu seq_lens seq_lens_cpu last_loc "
        "extend_num_tokens num_new_pages",
        alloc_decode="seq_lens seq_lens_cpu last_loc",
        merge_and_sort_free="",
    ),
    object_(f"{SRT}.platforms.cpu.CpuDeviceMixin", "", "start.platform"),
    object_(
        f"{SRT}.server_args.ServerArgs",
        "attention_backend max_total_tokens mem_fraction_static grammar_backend tp_size dtype "
        "moe_runner_backend disable_hybrid_swa_memory",
        "start.platform",
    ),
    function(
        f"{SRT}.server_args.ServerArgs.get_model_config", "self", "upstream.v0_5_17.arguments"
    ),
    object_(f"{SRT}.configs.model_config.ModelConfig", "dtype quantization", "start.platform"),
    object_(
        f"{SRT}.configs.model_config.ModelConfig",
        "num_attention_heads num_key_value_heads hf_config hf_text_config",
        "upstream.cpu_heads",
    ),
    function(
        f"{SRT}.configs.model_config.ModelConfig.get_total_num_kv_heads",
        "self",
        "upstream.cpu_heads",
    ),
    function(
        f"{SRT}.model_executor.model_runner.adjust_config_with_unaligned_cpu_tp",
        "model_config load_config tp_size",
        "upstream.cpu_heads",
    ),
    object_(f"{SRT}.platforms.device_mixin.PlatformEnum", "OOT", "start.platform"),
    function(
        f"{SRT}.layers.attention.attention_registry.register_attention_backend",
        "name",
        "attention.cpu",
    ),
    # Kernels that some models call whatever the device.
    object_(f"{SRT}.models.qwen2_moe", "fused_gate_sigmoid_mul_add", "upstream.cpu_kernels"),
    object_(f"{SRT}.layers.logits_processor", "fused_softcap", "upstream.cpu_kernels"),
    function(
        f"{SRT}.layers.moe.fused_moe_native.moe_forward_native",
        "layer x topk_output moe_runner_config",
        "upstream.cpu_kernels",
    ),
    object_(
        f"{SRT}.layers.moe.moe_runner.MoeRunnerConfig",
        "apply_router_weight_on_input",
        "upstream.cpu_kernels",
    ),
    # DP attention on a CPU.
    object_(f"{SRT}.layers.dp_attention", "memcpy_triton", "upstream.cpu_dp_attention"),
    object_(
        f"{SRT}.distributed.parallel_state.GroupCoordinator",
        "all_gather_into_tensor _all_gather_into_tensor reduce_scatter_tensor "
        "_reduce_scatter_tensor",
        "upstream.cpu_dp_attention",
    ),
    function(
        f"{SRT}.model_executor.forward_batch_info.ForwardBatch.prepare_mlp_sync_batch",
        "self model_runner",
        "upstream.cpu_dp_attention",
    ),
    function(
        f"{SRT}.layers.attention.torch_native_backend.TorchNativeAttnBackend.__init__",
        "self model_runner",
        "attention.cpu",
    ),
    function(
        f"{SRT}.layers.attention.torch_native_backend.TorchNativeAttnBackend"
        "._run_sdpa_forward_extend",
        "self query output k_cache v_cache req_to_token req_pool_indices seq_lens "
        "extend_prefix_lens extend_seq_lens encoder_lens scaling enable_gqa causal is_cross_attn "
        "sliding_window_size",
        "attention.cpu",
    ),
    function(
        f"{SRT}.layers.attention.torch_native_backend.TorchNativeAttnBackend.forward_extend",
        "self q k v layer forward_batch save_kv_cache",
        "attention.cpu",
    ),
    function(
        f"{DEEPSEEK}.attention_backend_handler.AttentionBackendRegistry.register",
        "backend_name handler_func",
        "attention.cpu",
    ),
    object_(
        f"{DEEPSEEK}.attention_forward_methods.forward_methods.AttnForwardMethod",
        "MLA",
        "attention.cpu",
    ),
    object_(f"{SRT}.platforms.interface.SRTPlatform", "", "start.platform"),
    *methods(
        f"{SRT}.platforms.interface.SRTPlatform",
        "start.platform",
        apply_server_args_defaults="server_args",
        get_default_attention_backend="",
        init_backend="",
    ),
    *methods(
        f"{SRT}.platforms.interface.SRTPlatform",
        "upstream.v0_5_17.hardware",
        get_mha_kv_pool_cls="",
        get_mla_kv_pool_cls="",
        get_paged_allocator_cls="",
    ),
)
