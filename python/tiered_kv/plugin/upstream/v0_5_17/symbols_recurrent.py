"""What is used of SGLang 0.5.17 for models with recurrent state: pools, requests, admission."""

from __future__ import annotations

from tiered_kv.plugin.upstream.symbol import MEM, SRT, function, methods, object_

_CACHE = "cache.hybrid_cache"
_HOOKS = "hooks.recurrent"

#: What a tree with recurrent state is asked for, and their parameters: none.
TREE_METHODS = dict.fromkeys(
    (
        *("supports_mamba", "full_evictable_size", "full_protected_size"),
        *("mamba_evictable_size", "mamba_protected_size", "all_mamba_values_flatten"),
        "sanity_check",
    ),
    "",
)

RECURRENT = (
    *(
        object_(f"{MEM}.base_prefix_cache.{name}", fields, _CACHE)
        for name, fields in {
            "EvictParams": "num_tokens",
            "EvictResult": "num_tokens_evicted",
        }.items()
    ),
    *methods(
        f"{MEM}.mamba_radix_cache.MambaRadixCache",
        _CACHE,
        **TREE_METHODS,
    ),
    object_(
        f"{MEM}.memory_pool.HybridReqToTokenPool",
        "mamba_pool device",
        "cache.state_pool cache.build_hybrid options.recurrent",
    ),
    *methods(
        f"{MEM}.memory_pool.HybridReqToTokenPool",
        f"{_HOOKS} {_CACHE}",
        alloc="reqs",
        free_mamba_cache="req mamba_ping_pong_track_buffer_to_keep",
    ),
    object_(
        f"{MEM}.memory_pool.MambaPool",
        "mamba_cache mamba_layer_ids",
        "cache.state_pool options.recurrent",
    ),
    object_(
        f"{MEM}.memory_pool.HybridLinearKVPool",
        "full_kv_pool full_attention_layer_id_mapping start_layer",
        "cache.state_pool cache.device_pool options.recurrent options.refusals",
    ),
    function(
        f"{MEM}.memory_pool.HybridLinearKVPool.register_layer_transfer_counter",
        "self layer_transfer_counter",
        "cache.build_hybrid",
    ),
    object_(
        f"{SRT}.managers.schedule_batch.Req",
        "mamba_pool_idx mamba_needs_clear full_untruncated_fill_ids prefix_indices "
        "host_hit_length get_fill_ids kv_committed_len",
        f"{_CACHE} {_HOOKS} upstream.v0_5_17.request_kv upstream.v0_5_17.cache_contract",
    ),
    function(
        f"{SRT}.managers.scheduler.Scheduler.run_batch", "self batch pp_proxy_tensors", _HOOKS
    ),
    object_(
        f"{SRT}.managers.schedule_policy.PrefillAdder",
        "tree_cache rem_chunk_tokens can_run_list",
        _HOOKS,
    ),
    *methods(
        f"{SRT}.managers.schedule_policy.PrefillAdder",
        _HOOKS,
        add_one_req="req has_chunked_req truncation_align_size",
        add_chunked_req="req",
    ),
    object_(
        f"{SRT}.server_args.ServerArgs",
        "mamba_radix_cache_strategy mamba_track_interval uses_mamba_radix_cache "
        "enable_linear_replayssm enable_int8_mamba_checkpoint enable_mixed_chunk tp_size dp_size "
        "chunked_prefill_size enable_deterministic_inference disable_overlap_schedule",
        "options.recurrent cache.build_hybrid",
    ),
    function(
        f"{SRT}.server_args.ServerArgs._validate_mamba_no_buffer",
        "self view model_arch",
        "upstream.v0_5_17.arguments",
    ),
)
