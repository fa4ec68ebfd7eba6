"""Model shapes: KV bytes and parameter counts against published figures, and bad configs."""

from __future__ import annotations

from typing import Any

import pytest

from tiered_kv.core.errors import ConfigError
from tiered_kv.core.model_spec import MODELS, ModelSpec, find_model

LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
MIXTRAL = {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
GPT2 = {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12}
GEMMA = {
    "model_type": "gemma",
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
}
QWEN_7B = {
    "model_type": "qwen",
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "kv_channels": 128,
}
FALCON_7B = {
    "model_type": "falcon",
    "vocab_size": 65024,
    "hidden_size": 4544,
    "num_hidden_layers": 32,
    "num_attention_heads": 71,
    "num_kv_heads": 71,
    "multi_query": True,
    "new_decoder_architecture": False,
}
QWEN25_7B = {
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}


def read(config: dict[str, Any], **options: Any) -> ModelSpec:
    return ModelSpec.from_hf_config(config, name="some-model", **options)


@pytest.mark.parametrize(
    ("config", "published"),
    [
        (LLAMA_8B, 8_030_261_248),
        (MIXTRAL, 46_702_792_704),
        (GEMMA, 8_537_680_896),
        (QWEN_7B, 7_721_324_544),
        (QWEN25_7B, 7_615_616_512),
    ],
)
def test_counts_every_parameter(config: dict[str, Any], published: int) -> None:
    assert read(config).n_parameters == published


def test_counts_experts_and_latent_attention() -> None:
    spec = read(DEEPSEEK_V3)
    # DeepSeek-V3's report (arXiv 2412.19437) says 671B in all, 37B active (embeddings left out).
    assert spec.n_parameters == pytest.approx(671e9, rel=1e-3)
    assert spec.n_active_parameters - 129280 * 7168 == pytest.approx(37e9, rel=0.02)


def test_counts_an_ungated_mlp_and_tied_embeddings() -> None:
    # 124,439,808 are published; position embeddings and most biases are left out here.
    spec = read(GPT2)
    assert spec.tied_embeddings
    assert spec.intermediate_size == 4 * 768
    assert 0 < 124_439_808 - spec.n_parameters < 1.0e6


@pytest.mark.parametrize(
    ("config", "kind", "n_bytes"),
    [
        (LLAMA_8B, "GQA", 2 * 8 * 128 * 2),
        (QWEN_7B, "MHA", 2 * 32 * 128 * 2),
        (GEMMA, "MHA", 2 * 16 * 256 * 2),
        (DEEPSEEK_V3, "MLA", (512 + 64) * 2),
        ({**LLAMA_8B, "num_key_value_heads": 1}, "MQA", 2 * 128 * 2),
        ({**GPT2, "model_type": "gpt_bigcode", "multi_query": True}, "MQA", 2 * 64 * 2),
        (FALCON_7B, "MQA", 2 * 64 * 2),
        ({**FALCON_7B, "new_decoder_architecture": True}, "MHA", 2 * 71 * 64 * 2),
    ],
)
def test_kv_bytes_of_each_kind_of_attention(
    config: dict[str, Any], kind: str, n_bytes: int
) -> None:
    spec = read(config)
    assert spec.attention_kind == kind
    assert spec.kv_bytes_per_token_layer == n_bytes
    assert spec.kv_bytes_per_token == n_bytes * spec.n_layers


def test_element_sizes_scale_bytes() -> None:
    spec = read(LLAMA_8B, kv_bytes_per_element=1, weight_bytes_per_parameter=0.5)
    assert spec.kv_bytes_per_token == 65536
    assert spec.weight_bytes == 8_030_261_248 / 2


def test_reads_a_nested_language_model() -> None:
    nested = read({"model_type": "some_vlm", "text_config": LLAMA_8B, "vision_config": {}})
    assert nested.n_parameters == 8_030_261_248


def test_a_given_count_wins() -> None:
    spec = read(MIXTRAL, n_parameters=50_000_000_000)
    assert spec.n_parameters == 50_000_000_000
    assert spec.n_active_parameters == read(MIXTRAL).n_active_parameters


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in LLAMA_8B.items() if name != key}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, "no hidden_size"),
        (without("vocab_size"), "no vocab_size"),
        ({**LLAMA_8B, "num_hidden_layers": "32"}, "num_hidden_layers = '32'"),
        ({**LLAMA_8B, "num_attention_heads": 30}, "does not divide"),
        ({**LLAMA_8B, "num_key_value_heads": 5}, "5 KV heads"),
        (
            {**LLAMA_8B, "layer_types": ["full_attention", "mamba"] * 16},
            "without attention (mamba)",
        ),
        ({**LLAMA_8B, "layer_types": ["full_attention", "mamba"]}, "2 entries in layer_types"),
        ({**LLAMA_8B, "layer_types": ["mamba"] * 32}, "only mamba layers"),
        ({**LLAMA_8B, "layer_types": ["full_attention", "wavelet"] * 16}, "has wavelet layers"),
        ({**DEEPSEEK_V3, "qk_rope_head_dim": None}, "no qk_rope_head_dim"),
    ],
)
def test_a_config_that_cannot_work_is_one_sentence(config: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(config)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_presets_are_found_in_any_case_or_named() -> None:
    assert find_model("llama-3.1-8b") is MODELS["Llama-3.1-8B"]
    with pytest.raises(ConfigError, match=r"Llama-3\.1-8B"):
        find_model("no-such-model")
