"""What quantised weights take, against the sizes of published checkpoints; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support_plan import released
from tiered_kv.core.errors import ConfigError
from tiered_kv.plan.models import Overrides, load_model, model_of_config
from tiered_kv.plan.weights import Kind, Part, weight_bytes

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
QWEN_7B = {
    **LLAMA_8B,
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
W4A16 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "ignore": [
        "lm_head",
        "re:.*self_attn.*",
        "re:.*shared_experts.*",
        "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
    ],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "group_size": 32,
                "strategy": "group",
                "symmetric": True,
                "type": "int",
            },
        }
    },
}
W8A8 = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "strategy": "channel", "type": "float"},
        }
    },
}


def gigabytes(config: dict[str, Any], quantization: dict[str, Any] | None = None) -> float:
    change = {} if quantization is None else {"quantization_config": quantization}
    return model_of_config({**config, **change}, "x", Overrides()).model.weight_bytes / 1e9


@pytest.mark.parametrize(
    ("config", "quantization", "published_gb"),
    [
        # The size of the safetensors files of: openai/gpt-oss-120b and -20b,
        (released.GPT_OSS_120B, None, 65.25),
        (released.GPT_OSS_20B, None, 13.76),
        # Qwen/Qwen2.5-7B-Instruct-AWQ, hugging-quants/Meta-Llama-3.1-8B-Instruct-AWQ-INT4 and
        # -GPTQ-INT4, unsloth/Meta-Llama-3.1-8B-bnb-4bit,
        (QWEN_7B, AWQ, 5.57),
        (LLAMA_8B, AWQ, 5.73),
        (LLAMA_8B, {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}, 5.73),
        (
            LLAMA_8B,
            {
                "quant_method": "bitsandbytes",
                "load_in_4bit": True,
                "bnb_4bit_use_double_quant": True,
                "llm_int8_skip_modules": None,
            },
            5.70,
        ),
        # RedHatAI/Meta-Llama-3.1-8B-Instruct-FP8; as modelopt says it, and in four bits by hand;
        (LLAMA_8B, W8A8, 9.08),
        (LLAMA_8B, {"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}, 9.08),
        (LLAMA_8B, {"quant_algo": "NVFP4", "ignore": ["lm_head"]}, 6.03),
        # moonshotai/Kimi-K2-Thinking, of which only the experts are quantised.
        (released.KIMI_K2, W4A16, 594.0),
    ],
)  # fmt: skip
def test_weights_take_what_the_checkpoint_does(
    config: dict[str, Any], quantization: dict[str, Any] | None, published_gb: float
) -> None:
    assert gigabytes(config, quantization) == pytest.approx(published_gb, rel=0.01)


def test_fp8_with_scales_of_blocks() -> None:
    # 671B in fp8, but for the two embeddings; a float32 scale for 128 x 128.
    embeddings = 2 * 129280 * 7168
    n = model_of_config(released.DEEPSEEK_V3, "x", Overrides()).model.n_parameters
    expected = (n - embeddings) * (1 + 4 / 128**2) + embeddings * 2
    assert gigabytes(released.DEEPSEEK_V3) * 1e9 == pytest.approx(expected, rel=2e-4)


PARTS = [
    Part("model.embed_tokens", 1000, Kind.EMBEDDING),
    Part("model.layers.0.self_attn.q_proj", 1000, Kind.LINEAR),
    Part("model.layers.1.self_attn.q_proj", 1000, Kind.LINEAR),
    Part("model.layers.1.mlp.experts", 1000, Kind.EXPERT),
    Part("model.layers.1.mlp.gate", 1000, Kind.OTHER),
    Part("visual.blocks.0", 1000, Kind.ENCODER),
    Part("lm_head", 1000, Kind.HEAD),
]


@pytest.mark.parametrize(
    ("quantization", "n_bytes"),
    [
        ({}, [2, 2, 2, 2, 2]),
        ({"quant_method": "fp8"}, [2, 1, 1, 1, 2]),
        ({"quant_method": "fp8", "modules_to_not_convert": ["model.layers.0"]}, [2, 2, 1, 1, 2]),
        ({"quant_method": "fp8", "ignored_layers": ["self_attn"]}, [2, 2, 2, 1, 2]),
        (
            {"quant_method": "fp8", "ignored_layers": ["language_model.model.layers.1.self_attn"]},
            [2, 1, 2, 1, 2],
        ),
        ({"quant_method": "fp8", "ignored_layers": ["attn", "mlp.gate_proj"]}, [2, 1, 1, 1, 2]),
        ({"quant_method": "mxfp4"}, [2, 2, 2, 0.53125, 2]),
        ({"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.mlp"]}, [2] * 5),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1, "lm_head": True}, [2, 1, 1, 1, 1]),
        (
            {
                "quant_method": "gptq", "bits": 4, "group_size": -1,
                "dynamic": {"-:.*self_attn.*": {}, "+:.*experts.*": {"bits": 8}},
            },
            [2, 2, 2, 1, 2],
        ),
        (
            {
                "quant_method": "auto-round", "bits": 4, "group_size": -1,
                "extra_config": {"model.layers.0.self_attn.q_proj": {"bits": 16}},
            },
            [2, 2, 0.5, 0.5, 2],
        ),
        ({**W8A8, "ignore": []}, [2, 1, 1, 1, 1]),
        ({**W8A8, "ignore": ["re:.*q_proj$", "lm_head"]}, [2, 2, 2, 1, 2]),
        (
            {
                "quant_algo": "MIXED_PRECISION",
                "quantized_layers": {
                    "model.layers.0.self_attn.q_proj": {"quant_algo": "FP8"},
                    "model.layers.1.mlp.experts.0.up_proj": {"quant_algo": "NVFP4"},
                },
            },
            [2, 1, 2, 0.5625, 2],
        ),
        ({"quant_method": "modelopt", "quant_algo": None, "kv_cache_quant_algo": "FP8"}, [2] * 5),
        (
            {
                "quant_method": "quark", "exclude": ["lm_head", "re:.*self_attn.*"],
                "global_quant_config": {
                    "weight": {"dtype": "fp4", "qscheme": "per_group", "group_size": 32}
                },
            },
            [2, 2, 2, 0.53125, 2],
        ),
    ],
)  # fmt: skip
def test_which_weights_are_quantised(quantization: dict[str, Any], n_bytes: list[float]) -> None:
    embedding, first, second, expert, head = n_bytes
    expected = 1000 * (embedding + first + second + expert + 2 + 2 + head)
    assert weight_bytes(PARTS, {"quantization_config": quantization}, "x") == expected


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "hqq", "bits": 4},
        {"quant_method": "aqlm"},
        {"quant_method": "torchao", "quant_type": "int4wo"},
        {"quant_method": "w4afp8"},
        {"quant_method": "gptq"},
        {"quant_method": "bitsandbytes"},
        {"quant_method": "compressed-tensors", "config_groups": {}},
        {**W8A8, "config_groups": {"group_0": {"weights": {}, "targets": ["Embedding"]}}},
        {**W8A8, "sparsity_config": {"format": "sparse-24-bitmask"}},
        {**W8A8, "ignore": ["re:("]},
        {"quant_method": "modelopt", "quant_algo": "W2A2"},
        {"quant_algo": "MIXED_PRECISION"},
        {"quant_method": "quark", "global_quant_config": {"weight": [{"dtype": "int4"}]}},
        {"bits": 4},
        ["fp8"],
    ],
)  # fmt: skip
def test_what_is_not_understood_names_the_option(quantization: Any) -> None:
    with pytest.raises(ConfigError, match="--weight-bytes") as caught:
        weight_bytes(PARTS, {"quantization_config": quantization}, "some-model")
    assert "some-model" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_given_count_whatever_the_config_says() -> None:
    config = {**LLAMA_8B, "quantization_config": {"quant_method": "hqq"}}
    model = model_of_config(config, "x", Overrides(weight_bytes=0.5)).model
    assert model.weight_bytes == model.n_parameters / 2
    quantised = {**released.HUNYUAN_LARGE, "quantization_config": AWQ}
    with pytest.raises(ConfigError, match="--weight-bytes"):
        model_of_config(quantised, "x", Overrides(parameters="48B:3B"))


def test_a_quantisation_beside_the_config_counts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    plain = load_model(str(tmp_path), Overrides()).model.weight_bytes
    beside = {"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(beside))
    assert load_model(str(tmp_path), Overrides()).model.weight_bytes < 0.6 * plain


@pytest.mark.parametrize("text", ["many", "0B", "3B:48B", "1B:1B:1B", "-3B", ""])
def test_a_number_of_parameters_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match="no number of parameters"):
        load_model("Llama-3.1-8B", Overrides(parameters=text))
