"""What a checkpoint of recurrent state takes: the planner's figure is that of SGLang's own pool."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tiered_kv.core.model_spec import ModelSpec

_SIZES: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512,
}  # fmt: skip
_DELTA = {
    "num_hidden_layers": 4, "head_dim": 32, "full_attention_interval": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 32, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_conv_kernel_dim": 4, "num_experts": 0,
}  # fmt: skip
ONE_RANK = SimpleNamespace(attn_tp_size=1)
HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    # SGLang's class of the configuration, and a shape
    "LFM2": (
        "Lfm2Config",
        {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    ),
    "Qwen3-Next": ("Qwen3NextConfig", _DELTA),
    "Nemotron-H": (
        "NemotronHConfig",
        {
            "hybrid_override_pattern": "M*M-", "mamba_num_heads": 8, "mamba_head_dim": 16,
            "n_groups": 2, "ssm_state_size": 32, "conv_kernel": 4, "head_dim": 32,
        },
    ),
}  # fmt: skip


def own_pool(config: Any) -> int:
    """Bytes of one slot of the pool of states that SGLang allocates for `config`."""
    from sglang.srt.mem_cache.memory_pool import MambaPool

    from tiered_kv.plugin.cache.state_pool import StatePoolCopier

    params = config.mamba2_cache_params
    pool = MambaPool(
        size=3,
        spec_state_size=0,
        cache_params=params,
        mamba_layer_ids=list(params.layers),
        device="cpu",
    )
    copier = StatePoolCopier(pool)
    assert copier.n_bytes == params.mamba_cache_per_req
    return copier.n_bytes


@pytest.mark.parametrize("name", HYBRIDS)
def test_the_planner_counts_what_the_pool_allocates(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = pytest.importorskip("sglang.srt.configs")
    kind, shape = HYBRIDS[name]
    owner = getattr(configs, kind)
    monkeypatch.setattr(f"{owner.__module__}.get_parallel", lambda: ONE_RANK)
    # As 0.5.23 has it for linear attention.
    monkeypatch.setattr(f"{owner.__module__}.linear_attn_tp_size", lambda: 1, raising=False)
    config = owner(**_SIZES, **shape)
    planned = ModelSpec.from_hf_config(
        config.to_dict(), name=name, n_parameters=1, n_active_parameters=1
    )
    assert planned.state_bytes == own_pool(config) > 0


def test_a_state_comes_back_as_it_was() -> None:
    from tiered_kv.plugin.cache.state_pool import StatePoolCopier

    cache = SimpleNamespace(
        conv=[torch.randn(2, 4, 3, 5).to(torch.bfloat16)], temporal=torch.randn(2, 4, 7)
    )
    copier = StatePoolCopier(SimpleNamespace(mamba_cache=cache))
    memory = np.zeros(copier.n_bytes, np.uint8)
    before = [cache.conv[0].clone(), cache.temporal.clone()]
    copier.save(2, memory)
    cache.conv[0].zero_()
    cache.temporal.zero_()
    copier.restore(memory, 1)
    assert torch.equal(cache.conv[0][:, 1], before[0][:, 2])
    assert torch.equal(cache.temporal[:, 1], before[1][:, 2])
    assert not cache.temporal[:, [0, 2, 3]].any(), "a neighbour was written"
