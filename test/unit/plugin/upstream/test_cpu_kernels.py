"""Kernels in plain torch, against what they are to compute written out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("sglang")

import torch
from sglang.srt.layers.moe import fused_moe_native
from sglang.srt.layers.moe.moe_runner import MoeRunnerConfig
from sglang.srt.layers.moe.topk import StandardTopKOutput

from tiered_kv.plugin.upstream import cpu_kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_shared_expert_says_is_gated_and_added(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, shared, total = (torch.randn(5, 8).to(dtype) for _ in range(3))
    gate = torch.randn(8).to(dtype)
    opened = [torch.sigmoid((row.float() * gate.float()).sum()) for row in hidden]
    expected = torch.stack(
        [t.float() + s.float() * o for t, s, o in zip(total, shared, opened, strict=True)]
    )
    cpu_kernels.add_gated(hidden, gate, shared, total)
    assert total.dtype == dtype
    torch.testing.assert_close(total, expected.to(dtype))


def test_logits_stay_below_the_cap() -> None:
    logits = torch.tensor([[-1e6, -3.0, 0.0], [0.5, 30.0, 1e6]])
    expected = 30 * torch.tanh(logits / 30)
    assert cpu_kernels.cap_logits(logits, 30.0) is logits
    torch.testing.assert_close(logits, expected)


@pytest.mark.usefixtures("args")
def test_the_router_weighs_what_experts_are_given() -> None:
    torch.manual_seed(0)
    layer = SimpleNamespace(
        num_experts=3, w13_weight=torch.randn(3, 8, 5), w2_weight=torch.randn(3, 5, 4)
    )
    x, weights = torch.randn(6, 5), torch.rand(6, 1)
    chosen = torch.randint(3, (6, 1))
    config = MoeRunnerConfig(activation="silu", apply_router_weight_on_input=True)
    rows = []
    for token, weight, (expert,) in zip(x, weights, chosen.tolist(), strict=True):
        gate, up = (layer.w13_weight[expert] @ (token * weight)).chunk(2)
        rows.append(layer.w2_weight[expert] @ (torch.nn.functional.silu(gate) * up))
    cpu_kernels.register()
    output = StandardTopKOutput(weights, chosen.int(), torch.zeros(6, 3))
    computed = fused_moe_native.moe_forward_native(layer, x, output, config)
    torch.testing.assert_close(computed, torch.stack(rows))
    assert config.apply_router_weight_on_input
    two = StandardTopKOutput(weights.expand(6, 2), chosen.expand(6, 2), torch.zeros(6, 3))
    with pytest.raises(NotImplementedError, match="one expert"):
        fused_moe_native.moe_forward_native(layer, x, two, config)


def test_sglang_finds_them() -> None:
    from sglang.srt.layers import logits_processor
    from sglang.srt.models import qwen2_moe

    cpu_kernels.register()
    assert qwen2_moe.fused_gate_sigmoid_mul_add is cpu_kernels.add_gated
    assert logits_processor.fused_softcap is cpu_kernels.cap_logits
    experts = fused_moe_native.moe_forward_native
    cpu_kernels.register()
    assert fused_moe_native.moe_forward_native is experts, "wrapped twice"
