"""What is used of SGLang 0.5.17 for cascade attention: where batches pass by, and the backends."""

from __future__ import annotations

from tiered_kv.plugin.upstream_symbol import SRT, function, object_

_NATIVE = f"{SRT}.layers.attention.torch_native_backend.TorchNativeAttnBackend"

ATTENTION = (
    function(
        f"{SRT}.model_executor.forward_batch_info.ForwardBatch.init_new",
        "batch model_runner capture_hidden_mode return_hidden_states_before_norm",
        "cascade",
    ),
    function(
        f"{SRT}.model_executor.model_runner.ModelRunner.forward",
        "self forward_batch skip_attn_backend_init pp_proxy_tensors reinit_attn_backend "
        "split_forward_count",
        "cascade",
    ),
    object_(
        f"{SRT}.model_executor.model_runner.ModelRunner",
        "attn_backend server_args model_config token_to_kv_pool is_draft_worker use_mla_backend "
        "sliding_window_size",
        "cascade",
    ),
    object_(
        f"{SRT}.managers.schedule_batch.ScheduleBatch",
        "forward_mode spec_info encoder_lens seq_lens_cpu reqs tree_cache",
        "cascade",
    ),
    object_(f"{SRT}.managers.schedule_batch.Req", "last_node", "cascade"),
    object_(
        f"{SRT}.configs.model_config.ModelConfig",
        "num_attention_heads head_dim is_encoder_decoder",
        "cascade",
    ),
    function(
        f"{SRT}.configs.model_config.ModelConfig.get_num_kv_heads",
        "self tensor_parallel_size",
        "cascade",
    ),
    object_(
        f"{SRT}.server_args.ServerArgs",
        "device tp_size attention_backend enable_deterministic_inference enable_torch_compile",
        "cascade cascade_option",
    ),
    function(f"{SRT}.server_args.ServerArgs.get_attention_backends", "self", "cascade_option"),
    object_(
        f"{SRT}.model_executor.forward_batch_info.ForwardBatch", "req_pool_indices", "cpu_attention"
    ),
    object_(f"{SRT}.layers.radix_attention.RadixAttention", "logit_cap", "cpu_attention"),
    object_(_NATIVE, "req_to_token_pool token_to_kv_pool", "cpu_attention"),
    function(f"{_NATIVE}.init_forward_metadata", "self forward_batch", "cpu_attention"),
    function(
        f"{_NATIVE}.forward_decode", "self q k v layer forward_batch save_kv_cache", "cpu_attention"
    ),
    function(
        f"{_NATIVE}._run_sdpa_forward_decode",
        "self query output k_cache v_cache req_to_token req_pool_indices seq_lens encoder_lens "
        "scaling enable_gqa causal is_cross_attn sliding_window_size",
        "cpu_attention",
    ),
)
