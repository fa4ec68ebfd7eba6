"""How large the recurrent state of a model is: what a checkpoint of it takes."""

from __future__ import annotations

from collections.abc import Sequence

from tiered_kv.core.config_reader import ConfigReader

#: Kinds of layers that have a state, of those without KV.
_STATEFUL = frozenset({"linear_attention", "mamba", "conv"})
#: SGLang keeps the inputs that a convolution looks back to in bfloat16 and states in float32,
#: whatever the model's type (configs/mamba_utils.py: `mamba2_state_dtype`).
_CONV_BYTES, _STATE_BYTES = 2, 4


def state_bytes(reader: ConfigReader, kinds_without_kv: Sequence[str]) -> int:
    """Bytes of the state of one request in all layers; 0 if there is none, or it is not known."""
    n_layers = sum(kind in _STATEFUL for kind in kinds_without_kv)
    shape = _layer_shape(reader) if n_layers else None
    if shape is None:
        return 0
    conv_elements, state_elements = shape
    return n_layers * (conv_elements * _CONV_BYTES + state_elements * _STATE_BYTES)


def _layer_shape(reader: ConfigReader) -> tuple[int, int] | None:
    """Elements of (the convolution's inputs, the state) of one layer; None: not known."""
    take = reader.take
    if take("conv_L_cache"):  # LFM2
        return take("hidden_size") * (take("conv_L_cache") - 1), 0
    if take("linear_num_value_heads"):  # gated delta nets: Qwen3-Next, Qwen3.5
        key_dim, heads = take("linear_key_head_dim"), take("linear_num_value_heads")
        width = heads * take("linear_value_head_dim")
        groups, kernel = take("linear_num_key_heads"), take("linear_conv_kernel_dim")
        return _mamba2(width, groups, key_dim, kernel)
    if take("mamba_num_heads"):  # Mamba 2: Nemotron-H
        width = take("mamba_num_heads") * take("mamba_head_dim")
        return _mamba2(width, take("n_groups"), take("ssm_state_size"), take("conv_kernel"))
    return None


def _mamba2(width: int, n_groups: int, state_size: int, kernel: int) -> tuple[int, int]:
    return (width + 2 * n_groups * state_size) * (kernel - 1), width * state_size
