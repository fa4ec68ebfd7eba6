"""The prefix cache of a model with recurrent state, put together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tiered_kv.plugin.cache.hybrid_cache import HybridPrefixCache
from tiered_kv.plugin.cache.state_pool import FullLayersGate, open_states
from tiered_kv.plugin.upstream.current import arguments
from tiered_kv.tiers.recurrent import STATES_SHARE

if TYPE_CHECKING:
    from sglang.srt.mem_cache.registry import TreeCacheBuildContext

    from tiered_kv.plugin.cache.parts import CacheParts


def build_hybrid(
    ctx: TreeCacheBuildContext, parts: CacheParts, *, is_named: bool
) -> HybridPrefixCache:
    """is_named: whether KV of this model has a name that outlives the server.

    Raises ConfigError or DiskTierError if there is no room for checkpoints.
    """
    params = ctx.params
    context = parts.hierarchy.context
    states = open_states(
        params.req_to_token_pool,
        int(context.host.pages.nbytes * STATES_SHARE / (1 - STATES_SHARE)),
        params.page_size,
        parts.disk_store if is_named else None,
        context.collective,
        pins=params.req_to_token_pool.device != "cpu",
    )
    context.beside = states
    interval: int = arguments.resolved(ctx.server_args).mamba_track_interval
    # Pages end there.
    interval = -(-interval // params.page_size) * params.page_size
    cache = HybridPrefixCache(params, parts, states, interval)
    # Where SGLang hands out slots for states (hooks/recurrent.py).
    params.req_to_token_pool.tiered_kv_cache = cache
    pool = params.token_to_kv_pool_allocator.get_kvcache()
    pool.register_layer_transfer_counter(FullLayersGate(parts.hierarchy.load_back.gate, pool))
    return cache
