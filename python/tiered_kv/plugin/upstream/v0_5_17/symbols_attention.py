"""What is used of SGLang 0.5.17 for cascade attention: where batches pass by, and the backends."""

from __future__ import annotations

from tiered_kv.plugin.upstream.symbol import MEM, SRT, function, methods, object_

_NATIVE = f"{SRT}.layers.attention.torch_native_backend.TorchNativeAttnBackend"
_FLASHINFER = f"{SRT}.layers.attention.flashinfer_backend"
_GRAPHS = f"{SRT}.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner"

ATTENTION = (
    function(
        f"{SRT}.model_executor.forward_batch_info.ForwardBatch.init_new",
        "batch model_runner capture_hidden_mode return_hidden_states_before_norm",
        "attention.cascade",
    ),
    function(
        f"{SRT}.model_executor.model_runner.ModelRunner.forward",
        "self forward_batch skip_attn_backend_init pp_proxy_tensors reinit_attn_backend "
        "split_forward_count",
        "attention.cascade",
    ),
    object_(
        f"{SRT}.model_executor.model_runner.ModelRunner",
        "attn_backend server_args model_config token_to_kv_pool is_draft_worker use_mla_backend "
        "sliding_window_size init_new_workspace",
        "attention.cascade attention.flashinfer",
    ),
    object_(
        f"{SRT}.managers.schedule_batch.ScheduleBatch",
        "forward_mode spec_info encoder_lens seq_lens_cpu reqs tree_cache",
        "attention.cascade",
    ),
    object_(f"{SRT}.managers.schedule_batch.Req", "last_node", "attention.cascade"),
    object_(
        f"{SRT}.configs.model_config.ModelConfig",
        "num_attention_heads head_dim is_encoder_decoder",
        "attention.cascade",
    ),
    function(
        f"{SRT}.configs.model_config.ModelConfig.get_num_kv_heads",
        "self tensor_parallel_size",
        "attention.cascade",
    ),
    object_(
        f"{SRT}.server_args.ServerArgs",
        "device tp_size attention_backend enable_deterministic_inference enable_torch_compile "
        "disable_cuda_graph",
        "attention.cascade options.cascade",
    ),
    object_(
        f"{SRT}.model_executor.forward_batch_info.ForwardBatch",
        "req_pool_indices out_cache_loc seq_lens_cpu",
        "attention.cpu",
    ),
    object_(
        f"{SRT}.layers.radix_attention.RadixAttention",
        "logit_cap layer_id scaling k_scale_float v_scale_float tp_q_head_num head_dim",
        "attention.cpu attention.flashinfer",
    ),
    object_(_NATIVE, "req_to_token_pool token_to_kv_pool", "attention.cpu"),
    function(f"{_NATIVE}.init_forward_metadata", "self forward_batch", "attention.cpu"),
    function(
        f"{_NATIVE}.forward_decode", "self q k v layer forward_batch save_kv_cache", "attention.cpu"
    ),
    function(
        f"{_NATIVE}._run_sdpa_forward_decode",
        "self query output k_cache v_cache req_to_token req_pool_indices seq_lens encoder_lens "
        "scaling enable_gqa causal is_cross_attn sliding_window_size",
        "attention.cpu",
    ),
    *methods(
        _GRAPHS,
        "attention.graphs",
        can_run_graph="forward_batch",
        capture_one_shape="size forward stream_idx variant_label",
        _resolve_lora_variant="forward_batch",
    ),
    object_(
        _GRAPHS,
        "attn_backend backend capture_bs capture_forward_mode enable_two_batch_overlap "
        "require_gathered_buffer",
        "attention.graphs",
    ),
    object_(
        f"{SRT}.model_executor.runner_backend.full_cuda_graph_backend.FullCudaGraphBackend",
        "",
        "attention.graphs",
    ),
    function(
        f"{_FLASHINFER}.FlashInferAttnBackend.__init__",
        "self model_runner skip_prefill kv_indptr_buf kv_last_page_len_buf init_new_workspace",
        "attention.flashinfer",
    ),
    *methods(
        f"{_FLASHINFER}.FlashInferAttnBackend",
        "attention.flashinfer",
        init_forward_metadata="forward_batch",
        init_cuda_graph_state="max_bs max_num_tokens kv_indices_buf",
        init_forward_metadata_out_graph="forward_batch in_capture",
        get_cuda_graph_seq_len_fill_value="",
        forward_decode="q k v layer forward_batch save_kv_cache",
        _check_kv_attention_access="phase access",
        _kv_write_scales="layer",
    ),
    object_(
        f"{_FLASHINFER}.FlashInferAttnBackend",
        "prefill_kv_access decode_kv_access indices_updater_decode dispatch_reason is_dllm_model "
        "is_nvfp4_kvcache decode_uses_dequant_workspace workspace_buffer decode_wrappers kv_indptr "
        "decode_cuda_graph_metadata forward_metadata req_to_token_pool token_to_kv_pool",
        "attention.flashinfer",
    ),
    function(
        f"{_FLASHINFER}.FlashInferIndicesUpdaterDecode.call_begin_forward",
        "self wrapper req_pool_indices paged_kernel_lens paged_kernel_lens_sum kv_indptr "
        "kv_start_idx spec_info seq_lens_cpu use_sliding_window_kv_pool fixed_split_size "
        "disable_split_kv",
        "attention.flashinfer",
    ),
    object_(
        f"{_FLASHINFER}.FlashInferIndicesUpdaterDecode",
        "num_qo_heads num_kv_heads head_dim data_type q_data_type",
        "attention.flashinfer",
    ),
    object_(f"{_FLASHINFER}.DecodeMetadata", "decode_wrappers", "attention.flashinfer"),
    object_(f"{MEM}.memory_pool.KVWriteLoc", "loc swa_loc", "attention.flashinfer"),
    object_(
        f"{SRT}.layers.attention.attention_registry.ATTENTION_BACKENDS", "", "attention.flashinfer"
    ),
)
