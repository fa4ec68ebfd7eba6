"""What SGLang 0.5.23 has in other places than 0.5.17 for models with recurrent state."""

from __future__ import annotations

from tiered_kv.plugin.upstream.symbol import MEM, SRT, function, methods, object_
from tiered_kv.plugin.upstream.v0_5_17.symbols_recurrent import TREE_METHODS

_ARGUMENTS = "upstream.v0_5_23.arguments"

RECURRENT = (
    *methods(
        f"{MEM}.unified_radix_cache.UnifiedRadixCache",
        "cache.hybrid_cache",
        **TREE_METHODS,
    ),
    object_(
        f"{MEM}.memory_pool.HybridReqToTokenPool",
        "short_conv_pool ngram_pool",
        "options.recurrent",
    ),
    object_(
        f"{SRT}.managers.schedule_batch.ReqKvInfo",
        "mamba_pool_idx mamba_needs_clear",
        "upstream.v0_5_23.request_kv cache.hybrid_cache",
    ),
    object_(
        f"{SRT}.managers.schedule_batch.Req",
        "refresh_fill_ids owned_kv_len",
        "upstream.v0_5_23.request_kv",
    ),
    object_(
        f"{SRT}.server_args.ServerArgs",
        "mamba_max_states_per_path enable_mamba_cache_stochastic_rounding",
        f"{_ARGUMENTS} options.refusals",
    ),
    function(
        f"{SRT}.arg_groups.mamba_hook.validate_mamba_no_buffer", "view model_arch", _ARGUMENTS
    ),
    function(f"{SRT}.arg_groups.model_override_base.record_of", "view", _ARGUMENTS),
    function(
        f"{SRT}.arg_groups.overrides.declare_resolution", "server_args source fields", _ARGUMENTS
    ),
)
