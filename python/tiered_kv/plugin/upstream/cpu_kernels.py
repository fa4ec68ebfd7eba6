"""Kernels that SGLang calls whatever the device and has for GPUs alone, in plain torch.

Each is a function of a few lines that some models need: an expert that all tokens share behind a
gate (Qwen2-MoE), logits with a soft cap (Gemma 2), inputs of experts that the router weighs
(Llama 4).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch


def register() -> None:
    """Put them into SGLang's modules, in the process that runs the model."""
    from sglang.srt.layers import logits_processor
    from sglang.srt.layers.moe import fused_moe_native
    from sglang.srt.models import qwen2_moe

    qwen2_moe.fused_gate_sigmoid_mul_add = add_gated
    logits_processor.fused_softcap = cap_logits
    experts: Callable[..., torch.Tensor] = fused_moe_native.moe_forward_native
    if not hasattr(experts, "__wrapped__"):
        fused_moe_native.moe_forward_native = functools.wraps(experts)(
            functools.partial(weigh_inputs, experts)
        )


def add_gated(
    hidden_states: torch.Tensor, gate: torch.Tensor, shared: torch.Tensor, total: torch.Tensor
) -> None:
    """Add `shared`, times what the gate says of each token, to `total`.

    hidden_states, shared, total: [tokens, hidden size]; gate: [hidden size].
    """
    opened = torch.sigmoid(hidden_states.float() @ gate.float())
    total.copy_(total.float() + shared.float() * opened[:, None])


def cap_logits(logits: torch.Tensor, cap: float) -> torch.Tensor:
    """Bring `logits`, of any shape, between -cap and cap in place, and return them."""
    return logits.div_(cap).tanh_().mul_(cap)


def weigh_inputs(
    experts: Callable[..., torch.Tensor],
    layer: Any,
    x: torch.Tensor,
    topk_output: Any,
    moe_runner_config: Any,
) -> torch.Tensor:
    """In the place of SGLang's `experts`, which knows weights of outputs alone.

    x: [tokens, hidden size]. Raises NotImplementedError for inputs of several experts each.
    """
    if moe_runner_config.apply_router_weight_on_input:
        weights = topk_output.topk_weights
        if weights.shape[1] != 1:
            raise NotImplementedError("Inputs are weighed here for one expert of each token only.")
        x = (x * weights).to(x.dtype)
        topk_output = topk_output._replace(topk_weights=torch.ones_like(weights))
        moe_runner_config = dataclasses.replace(
            moe_runner_config, apply_router_weight_on_input=False
        )
    return experts(layer, x, topk_output, moe_runner_config)
