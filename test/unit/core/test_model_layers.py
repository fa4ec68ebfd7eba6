"""Which layers keep KV: every dialect on a small config, and what is refused by its name."""

from __future__ import annotations

from typing import Any

import pytest

from tiered_kv.core.errors import ConfigError
from tiered_kv.core.model_config import Shape, read_shape

N_LAYERS = 8
BASE = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
LAYER = 2 * 2 * 16
"""Elements of KV of one token in one layer of BASE."""


def read(**fields: Any) -> Shape:
    return read_shape({**BASE, **fields}, "some-model")


def elements(shape: Shape) -> int:
    return sum(layers.n_layers * layers.kv_elements for layers in shape.kv_layers)


LINEAR = {"replace_with_linear": True}
BLOCK = {"n_heads_in_group": 2, "no_op": False, "replace_with_linear": False}


@pytest.mark.parametrize(
    ("fields", "n_keeping"),
    [
        ({}, 8),
        ({"layer_types": ["full_attention", "linear_attention"] * 4}, 4),
        ({"layer_types": ["attention"] * 2 + ["mamba"] * 6}, 2),
        ({"layer_types": ["attn", "jet", "swa", "jet"] * 2}, 4),
        ({"layer_types": ["sliding_attention"] * 7 + ["full_attention"]}, 8),
        # Entries beyond the layers are those of layers that predict several tokens.
        ({"layer_types": ["full_attention"] * 8 + ["sliding_attention"] * 3}, 8),
        ({"layers_block_type": ["mamba", "hybrid", "mlp", "attention"] * 2}, 4),
        ({"block_types": ["recurrent", "recurrent", "attention"]}, 2),
        ({"hybrid_override_pattern": "M-M*M-E*"}, 2),
        ({"full_attention_interval": 4}, 2),
        ({"full_attention_interval": 3}, 2),
        ({"layer_group_size": 2}, 4),
        ({"attn_layer_period": 4, "attn_layer_offset": 2}, 2),
        ({"attn_layer_period": 8, "attn_layer_offset": 0}, 1),
        ({"attn_layer_indices": [1, 5, 6]}, 3),
        ({"full_attn_idxs": [0]}, 1),
        ({"hybrid_layer_ids": [3, 7]}, 2),
        ({"attn_type_list": [0, 0, 0, 1] * 2}, 2),
        ({"hybrid_layer_pattern": [0, 1] * 4}, 8),
        ({"local_layer_ids": [0, 1, 2]}, 8),
        ({"cross_attention_layers": [3, 7]}, 6),
        (
            {"linear_attn_config": {"full_attn_layers": [4, 8], "kda_layers": [1, 2, 3, 5, 6, 7]}},
            2,
        ),
        ({"block_configs": [{"attention": BLOCK}, {"attention": {"no_op": True}}] * 4}, 4),
        ({"block_configs": [{"attention": LINEAR}] * 7 + [{"attention": BLOCK}]}, 1),
        ({"num_kv_shared_layers": 3}, 5),
        ({"use_cla": True, "cla_share_factor": 2}, 4),
        ({"use_cla": False, "cla_share_factor": 2}, 8),
        ({"loop_num": 2}, 16),
        ({"sliding_window": 4096, "use_sliding_window": False}, 8),
        # Lists of other things that layers have each.
        ({"no_rope_layers": [1, 1, 1, 0] * 2}, 8),
        ({"mlp_layer_types": ["dense"] + ["sparse"] * 7}, 8),
    ],
)  # fmt: skip
def test_layers_that_keep_kv(fields: dict[str, Any], n_keeping: int) -> None:
    assert elements(read(**fields)) == n_keeping * LAYER


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"num_key_value_heads": [2, 2, 2, 2, 1, 1, 1, 1]}, (4 * 2 + 4 * 1) * 32),
        ({"num_key_value_heads_per_layer": [4] * 4 + [2] * 4}, (4 * 4 + 4 * 2) * 32),
        ({"v_head_dim": 8}, 8 * 2 * (16 + 8)),
        (
            {
                "hybrid_layer_pattern": [0, 1] * 4, "swa_num_key_value_heads": 4,
                "swa_head_dim": 32, "swa_v_head_dim": 8,
            },
            4 * LAYER + 4 * 4 * 40,
        ),
        (
            {
                "layer_types": ["sliding_attention", "full_attention"] * 4,
                "attention_other_setting": {"num_attention_groups": 1, "head_dim": 8},
            },
            4 * LAYER + 4 * 16,
        ),
        (
            {
                "layer_types": ["sliding_attention", "full_attention"] * 4,
                "global_head_dim": 32, "num_global_key_value_heads": 1,
            },
            4 * LAYER + 4 * 2 * 64,
        ),
        (
            {
                "layer_types": ["sliding_attention", "full_attention"] * 4,
                "attention_k_eq_v": True, "global_head_dim": 32, "num_global_key_value_heads": 1,
            },
            4 * LAYER + 4 * 64,
        ),
        ({"num_key_value_heads": None, "attn_config": {"kv_n_heads": 1}}, 8 * 32),
        ({"num_key_value_heads": None, "num_attention_groups": 4}, 8 * 4 * 32),
        (
            {"kv_lora_rank": 100, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16},
            8 * 108,
        ),
        (
            {
                "kv_lora_rank": 100, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
                "layer_types": ["linear_attention", "full_attention"] * 4,
            },
            4 * 108,
        ),
        ({"kv_lora_rank": 100, "use_mla": False}, 8 * LAYER),
        ({"kv_lora_rank": None}, 8 * LAYER),
    ],
)  # fmt: skip
def test_widths_that_differ_between_layers(fields: dict[str, Any], expected: int) -> None:
    assert elements(read(**fields)) == expected


@pytest.mark.parametrize(
    ("fields", "n_windows", "window"),
    [
        ({"layer_types": ["local"] * 6 + ["global"] * 2, "sliding_window": 512}, 6, 512),
        ({"layer_types": ["chunked_attention"] * 8, "attention_chunk_size": 8192}, 8, 8192),
        ({"sliding_window_pattern": 4, "sliding_window": 100}, 6, 100),
        ({"sliding_window_pattern": "LLLG", "sliding_window": 100}, 6, 100),
        ({"sliding_window_pattern": 4, "sliding_window": None}, 0, 0),
        ({"global_attn_every_n_layers": 2, "sliding_window": 100}, 4, 100),
        ({"block_types": ["recurrent", "attention"], "attention_window_size": 64}, 4, 64),
    ],
)  # fmt: skip
def test_layers_that_look_back_a_window(
    fields: dict[str, Any], n_windows: int, window: int
) -> None:
    layers = [group for group in read(**fields).kv_layers if group.window_tokens]
    assert sum(group.n_layers for group in layers) == n_windows
    assert {group.window_tokens for group in layers} == ({window} if window else set())


@pytest.mark.parametrize(
    "nested",
    [
        {"text_config": BASE},
        {"llm_config": BASE},
        {"language_config": BASE},
        {"thinker_config": {"text_config": BASE}},
        {"num_hidden_layers": 24, "hidden_size": 1024, "text_config": BASE},
    ],
)
def test_nested_blocks(nested: dict[str, Any]) -> None:
    shape = read_shape({"model_type": "some_vlm", "tie_word_embeddings": True, **nested}, "x")
    assert elements(shape) == N_LAYERS * LAYER
    assert shape.tied_embeddings


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"layer_types": ["full_attention", "wavelet"] * 4}, "has wavelet layers"),
        ({"layer_types": ["compressed_sparse_attention"] * 8}, "compressed_sparse_attention"),
        ({"layer_types": ["full_attention"] * 5}, "5 entries in layer_types"),
        ({"layer_types": ["mamba"] * 8}, "only mamba layers"),
        ({"hybrid_override_pattern": "M-M*M-X*"}, "'X' in hybrid_override_pattern"),
        ({"attn_type_list": [0, 1, 2, 1] * 2}, "attn_type_list"),
        ({"attn_layer_indices": [1, 9]}, "9 in attn_layer_indices"),
        ({"linear_attn_config": {"full_attn_layers": [4], "kda_layers": [1]}}, "of its 8 layers"),
        ({"block_configs": [{"ffn": {}}] * 8}, "block_configs"),
        # Two lists that say different things.
        (
            {"layer_types": ["attention", "mamba"] * 4, "attn_layer_indices": [1, 3]},
            "by layer_types and by attn_layer_indices",
        ),
        # Layers of another kind, and no word which ones they are.
        ({"mamba_d_state": 16}, "mamba_d_state"),
        ({"ssm_cfg": {"layer": "Mamba2"}}, "ssm_cfg"),
        ({"linear_attention_ratio": 7}, "linear_attention_ratio"),
        ({"lightning_head_dim": 128}, "lightning_head_dim"),
        ({"short_conv_kernel_size": 4}, "short_conv_kernel_size"),
        ({"attn_layer_pattern": "LLLG"}, "attn_layer_pattern"),
        ({"mixer_types": ["a", "b"] * 4}, "mixer_types"),
        # What changes how much is kept.
        ({"kv_sharing_groups": 2}, "kv_sharing_groups"),
        ({"cross_layer_attention": 2}, "cross_layer_attention"),
        ({"compress_ratios": [0, 4, 128, 4]}, "compress_ratios"),
        ({"total_ut_steps": 4}, "total_ut_steps"),
        ({"index_head_dim": 128}, "index_head_dim"),
        ({"num_kv_shared_layers": 8}, "none keeps any"),
        ({"num_key_value_heads": [2, 2, 1]}, "3 entries in num_key_value_heads"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"type_vocab_size": 2, "architectures": ["BertModel"]}, "encoder's (BertModel)"),
        ({"num_attention_heads": None, "state_size": 16}, "state_size"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_named(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(**fields)
    assert says in str(caught.value)
    assert str(caught.value).startswith("The config of 'some-model'")
    assert "\n" not in str(caught.value)


MOE = {
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "intermediate_size": 96,
}


@pytest.mark.parametrize(
    ("fields", "n_layers"),
    [
        ({}, 8),
        ({"first_k_dense_replace": 3}, 5),
        ({"num_dense_layers": 2}, 6),
        ({"interleave_moe_layer_step": 2}, 4),
        ({"decoder_sparse_step": 2}, 4),
        ({"decoder_sparse_step": 1, "mlp_only_layers": [0, 3]}, 6),
        ({"moe_layer_freq": 1, "first_k_dense_replace": 1}, 7),
        ({"moe_layer_freq": 2}, 4),
        ({"moe_layer_freq": [0, 1, 1, 1, 1, 1, 1, 1]}, 7),
        ({"expert_layer_period": 2, "expert_layer_offset": 1}, 4),
        ({"mlp_layer_types": ["dense"] * 2 + ["sparse"] * 6}, 6),
        ({"moe_layers": [1, 3]}, 2),
        ({"moe_layers_enum": "4,5,6"}, 3),
        ({"moe_layer_start_index": 2, "moe_layer_end_index": 5, "moe_layer_interval": 1}, 4),
        ({"moe_layer_start_index": 2, "moe_layer_end_index": -1}, 6),
    ],
)  # fmt: skip
def test_layers_that_have_experts(fields: dict[str, Any], n_layers: int) -> None:
    shape = read(**MOE, **fields)
    assert shape.experts is not None
    assert shape.experts.n_layers == n_layers
    one_expert, dense = 3 * 64 * 32, 3 * 64 * 96
    parts = shape.count_parts()
    assert parts["experts"] == n_layers * 16 * one_expert
    assert parts["mlp"] == (N_LAYERS - n_layers) * dense


def test_a_mixture_that_is_switched_off_is_dense() -> None:
    assert read(**MOE, is_moe=False).experts is None
    assert read(**MOE, enable_moe_block=False).experts is None
    assert read(**{**MOE, "num_experts": 1}).experts is None


def test_a_rule_for_experts_that_is_not_understood_is_named() -> None:
    with pytest.raises(ConfigError, match="moe_every_n_layers = 3"):
        read(**MOE, moe_every_n_layers=3)
