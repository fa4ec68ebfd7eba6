"""Which shard of the KV this rank has, as SGLang shares it out."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.linear import QKVParallelLinear
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

from tiered_kv.plugin.cache.replicas import Replica
from tiered_kv.tiers.kv_shard import KVShard, kv_shard

if TYPE_CHECKING:
    from sglang.srt.mem_cache.registry import TreeCacheBuildContext


def shard_of(ctx: TreeCacheBuildContext, pool: Any, replica: Replica) -> KVShard:
    """Among the ranks of `replica`, this one's; pool: SGLang's KV pool."""
    rank, n_ranks = replica.rank, replica.n_ranks
    # A stage is on as many as its ranks need; stages are spread over them in order.
    n_all, n_stages = ctx.server_args.nnodes, ctx.params.pp_size
    return replace(_within(ctx, pool, rank, n_ranks, max(1, n_all // n_stages)), n_machines=n_all)


def _within(
    ctx: TreeCacheBuildContext, pool: Any, rank: int, n_ranks: int, n_machines: int
) -> KVShard:
    if ctx.is_hybrid_ssm:
        # Each rank has states of its own, and keeps its pages where it keeps those.
        return KVShard.alone(rank, n_ranks, n_machines)
    if isinstance(pool, MLATokenToKVPool):
        return kv_shard(rank, n_ranks, None, n_machines)
    n_kv_heads = ctx.model_config.get_total_num_kv_heads()
    model = ctx.tp_worker.model_runner.model
    if n_kv_heads < n_ranks and not gives_neighbours_equal_heads(model, n_ranks // n_kv_heads):
        return KVShard.alone(rank, n_ranks, n_machines)
    return kv_shard(rank, n_ranks, n_kv_heads, n_machines)


def gives_neighbours_equal_heads(model: torch.nn.Module, n_ranks: int) -> bool:
    """Whether every attention layer gives one KV head to `n_ranks` neighbours.

    SGLang's own projection does; of a model that brings another nobody knows who has what.
    """
    n_layers, n_known = 0, 0
    for module in model.modules():
        n_layers += isinstance(module, RadixAttention)
        n_known += isinstance(module, QKVParallelLinear) and module.num_kv_head_replicas == n_ranks
    return 0 < n_layers <= n_known
