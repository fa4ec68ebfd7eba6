"""Our reading of a config against the library's own models, and what is done without the library.

The library's model, on a device without memory, computes a short and a longer prompt; its cache
grows by what a token keeps. That is independent of everything that reads configs here.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import transformers

from support_plan import released
from tiered_kv.core.errors import ConfigError
from tiered_kv.core.model_config import read_shape
from tiered_kv.plan.library import library_config, library_parts
from tiered_kv.plan.models import Overrides, model_of_config

# The library's own defaults for each: plain attention of all kinds, windows in every layer or some,
# linear attention, convolutions, KV that layers share, layers run twice, heads of two widths.
TYPES = [
    "cohere2", "falcon", "gemma2", "gemma3n_text", "gemma4_text", "gpt2",
    "gpt_bigcode", "gpt_neo", "gpt_oss", "hrm_text", "lfm2", "llama4_text", "minimax",
    "modernbert-decoder", "mpt", "phi3", "qwen2_moe", "qwen3_next", "stablelm",
]  # fmt: skip
TIED = {"tie_word_embeddings": True}
SHORT, LONG = 16, 32


def cached_elements(model: Any, n_tokens: int) -> int:
    ids = torch.zeros((1, n_tokens), dtype=torch.long, device="meta")
    with torch.no_grad():
        layers = model(input_ids=ids, use_cache=True).past_key_values.layers
    kept = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    return sum(tensor.numel() for tensor in kept if isinstance(tensor, torch.Tensor))


@pytest.mark.parametrize("model_type", TYPES)
def test_kv_grows_as_in_the_librarys_own_cache(model_type: str) -> None:
    config = transformers.CONFIG_MAPPING[model_type]()
    with torch.device("meta"):
        library = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model_of_config(config.to_dict(), model_type, Overrides(kv_bytes=1.0)).model
    grown = cached_elements(library, LONG) - cached_elements(library, SHORT)
    assert model.kv_bytes_per_token == grown / (LONG - SHORT)
    assert model.n_parameters == sum(weight.numel() for weight in library.parameters())


@pytest.mark.parametrize(
    "name",
    ["DEEPSEEK_V3", "GPT_OSS_20B", "LLAMA4_MAVERICK", "KIMI_K2", "QWEN25_VL_7B", "QWEN3_OMNI_30B"],
)
def test_shapes_count_almost_what_the_library_counts(name: str) -> None:
    # Where layers are alike, weights can be counted without the library: but for norms, biases and
    # encoders.
    config = getattr(released, name)
    made = library_config(config)
    parts = library_parts(made)
    assert parts
    text = sum(part.n for part in parts if part.kind.value != "encoder")
    total, _ = read_shape(config, name).count_parameters()
    assert total == pytest.approx(text, rel=0.005)


def test_without_the_library_a_config_is_taken_as_it_stands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    spec = model_of_config(released.DEEPSEEK_V3, "DeepSeek-V3", Overrides()).model
    assert spec.n_parameters == pytest.approx(671e9, rel=1e-3)
    assert spec.weight_bytes == pytest.approx(673e9, rel=0.01)
    with pytest.raises(ConfigError, match=r"without attention \(linear_attention\)"):
        model_of_config(released.QWEN3_NEXT, "Qwen3-Next", Overrides())
    with pytest.raises(ConfigError, match="num_attention_heads; add it"):
        model_of_config(released.GEMMA3_4B, "Gemma-3", Overrides())
    assert (
        model_of_config(
            released.QWEN3_NEXT, "Qwen3-Next", Overrides(parameters="80B:3B")
        ).model.kv_bytes_per_token
        == 24 * 1024
    )


def test_without_torch_weights_are_counted_by_their_shapes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    made = library_config(released.GPT_OSS_20B)
    assert made is not None
    assert library_parts(made) is None
    spec = model_of_config(released.GPT_OSS_20B, "gpt-oss-20b", Overrides()).model
    assert spec.n_parameters == pytest.approx(20.9e9, rel=0.01)


def test_it_is_said_how_parameters_were_counted() -> None:
    assert not model_of_config(released.QWEN3_NEXT, "x", Overrides()).note
    assert "config's sizes" in model_of_config(released.CHATGLM3_6B, "x", Overrides()).note
    assert not model_of_config(released.CHATGLM3_6B, "x", Overrides(parameters="6B")).note


@pytest.mark.parametrize(
    ("outside", "inside", "is_tied"),
    [
        ({}, {}, False),
        (TIED, {}, True),
        ({}, TIED, True),
        (TIED, {"tie_word_embeddings": False}, True),
    ],
)
def test_embeddings_are_tied_if_the_file_says_so(
    outside: dict[str, Any], inside: dict[str, Any], is_tied: bool
) -> None:
    # The library's defaults of the outer and the inner block differ.
    config = {**released.MISTRAL_SMALL_24B, **outside}
    config["text_config"] = {**config["text_config"], **inside}
    model = model_of_config(config, "x", Overrides()).model
    assert model.tied_embeddings == is_tied
    embedding = 131072 * 5120
    assert model.n_parameters == pytest.approx(24.01e9 - is_tied * embedding, rel=0.001)


def test_a_config_that_the_library_rejects_is_named_by_ours() -> None:
    wrong = {**released.GPT_OSS_20B, "num_hidden_layers": "24"}
    with pytest.raises(ConfigError, match="num_hidden_layers = '24'"):
        model_of_config(wrong, "x", Overrides())
