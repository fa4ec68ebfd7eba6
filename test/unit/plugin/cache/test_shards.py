"""Which shard a rank has, of SGLang's pool, model and arguments."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

from support_plugin import on_release
from tiered_kv.plugin.cache.replicas import Replica
from tiered_kv.plugin.cache.shards import shard_of
from tiered_kv.tiers.kv_shard import KVShard, kv_shard


class Layer(torch.nn.Module):
    """An attention layer of 8 query heads; projected by SGLang's layer, or by the model's own."""

    def __init__(self, n_kv_heads: int, n_ranks: int, *, is_own: bool = False) -> None:
        super().__init__()
        self.attn = RadixAttention(8 // n_ranks, 16, 1.0, max(1, n_kv_heads // n_ranks), 0)
        self.qkv = (
            torch.nn.Linear(32, 32)
            if is_own
            else on_release.qkv_projection(
                n_kv_heads, n_ranks, hidden_size=32, head_size=16, total_num_heads=8
            )
        )


def shards(
    n_ranks: int, n_kv_heads: int, *layers: Layer, pool: Any = None, is_hybrid_ssm: bool = False
) -> list[KVShard]:
    model = torch.nn.ModuleList(layers)
    return [
        shard_of(
            SimpleNamespace(  # type: ignore[arg-type]
                is_hybrid_ssm=is_hybrid_ssm,
                server_args=SimpleNamespace(nnodes=1),
                params=SimpleNamespace(pp_size=1),
                model_config=SimpleNamespace(get_total_num_kv_heads=lambda: n_kv_heads),
                tp_worker=SimpleNamespace(model_runner=SimpleNamespace(model=model)),
            ),
            pool,
            Replica(0, 1, rank, n_ranks, server=7),
        )
        for rank in range(n_ranks)
    ]


@pytest.mark.parametrize(("n_ranks", "n_kv_heads"), [(1, 2), (2, 2), (2, 8), (4, 2), (8, 1)])
def test_heads_that_sglang_gives_out(n_ranks: int, n_kv_heads: int) -> None:
    layers = [Layer(n_kv_heads, n_ranks) for _ in range(2)]
    expected = [kv_shard(rank, n_ranks, n_kv_heads) for rank in range(n_ranks)]
    assert shards(n_ranks, n_kv_heads, *layers) == expected


def test_heads_that_a_model_gives_out_by_itself_are_nobody_elses() -> None:
    alone = [KVShard.alone(rank, 4) for rank in range(4)]
    assert shards(4, 2, Layer(2, 4), Layer(2, 4, is_own=True)) == alone
    # One layer has other heads than the configuration says.
    assert shards(4, 2, Layer(2, 4), Layer(1, 4)) == alone
    assert shards(4, 2) == alone


def test_who_has_a_share_of_recurrent_states_keeps_pages_beside_it() -> None:
    alone = [KVShard.alone(rank, 4) for rank in range(4)]
    assert shards(4, 2, Layer(2, 4), is_hybrid_ssm=True) == alone


def test_latents_are_the_same_on_all_ranks() -> None:
    pool = MLATokenToKVPool(
        size=16,
        page_size=16,
        dtype=torch.float32,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        layer_num=1,
        device="cpu",
        enable_memory_saver=False,
    )
    found = shards(4, 8, pool=pool)
    assert found == [kv_shard(rank, 4, None) for rank in range(4)]
