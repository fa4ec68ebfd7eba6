"""Released configs: KV per token by hand from the geometry, and parameters as published."""

from __future__ import annotations

import sys
from importlib import metadata

import pytest
from packaging.version import Version

from support_plan import released, released_too
from support_plan.refused import REFUSED
from tiered_kv.core.errors import ConfigError
from tiered_kv.core.model_spec import ModelSpec
from tiered_kv.plan.models import Overrides, model_of_config

# Elements of K and V that a token has in all layers, times two bytes, and billions of parameters
# as published (text and encoders).
COUNTED = {
    "QWEN3_NEXT": (12 * 2 * 2 * 256 * 2, 79.7),
    "QWEN35_27B": (16 * 2 * 4 * 256 * 2, 27.4),
    "GEMMA3_4B": (34 * 2 * 4 * 256 * 2, 4.30),
    "GEMMA3N_E4B": (20 * 2 * 2 * 256 * 2, 7.85),
    "DEEPSEEK_V3": (61 * 576 * 2, 671.0),
    # The indexer's keys are 128 bytes and a scale of 4.
    "DEEPSEEK_V32": (61 * (576 * 2 + 132), 671.9),
    "KIMI_K2": (61 * 576 * 2, 1026.0),
    "GPT_OSS_120B": (36 * 2 * 8 * 64 * 2, 116.8),
    "GPT_OSS_20B": (24 * 2 * 8 * 64 * 2, 20.9),
    "LLAMA4_MAVERICK": (48 * 2 * 8 * 128 * 2, 401.6),
    "LLAMA4_SCOUT": (48 * 2 * 8 * 128 * 2, 108.6),
    "JAMBA": (4 * 2 * 8 * 128 * 2, 51.6),
    "NEMOTRON_H_8B": (4 * 2 * 8 * 128 * 2, 8.10),
    "BAMBA_9B": (3 * 2 * 8 * 128 * 2, 9.78),
    "LFM2_1B": (6 * 2 * 8 * 64 * 2, 1.17),
    "GRANITE4_H_SMALL": (4 * 2 * 8 * 128 * 2, 32.2),
    "FALCON_H1_34B": (72 * 2 * 4 * 128 * 2, 33.6),
    "RECURRENT_GEMMA_2B": (8 * 2 * 1 * 256 * 2, 2.68),
    "LLAMA32_VISION_11B": (32 * 2 * 8 * 128 * 2, 10.67),
    "QWEN3_OMNI_30B": (48 * 2 * 4 * 128 * 2, 31.7),
    "QWEN25_VL_7B": (28 * 2 * 4 * 128 * 2, 8.29),
    "INTERNVL3_8B": (28 * 2 * 4 * 128 * 2, 7.62),
    "DEEPSEEK_VL2_TINY": (12 * 2 * 10 * 128 * 2, 2.94),
    "MISTRAL_SMALL_24B": (40 * 2 * 8 * 128 * 2, 24.0),
    "BLOOM": (70 * 2 * 14336 * 2, 176.2),
    "FALCON_40B": (60 * 2 * 8 * 64 * 2, 41.3),
    "LONGCAT_FLASH": (56 * 576 * 2, 560.0),
    "HUNYUAN_A13B": (32 * 2 * 8 * 128 * 2, 80.4),
    "ERNIE_300B": (54 * 2 * 8 * 128 * 2, 299.0),
    "NEMOTRON_3_NANO": (6 * 2 * 2 * 128 * 2, 31.6),
    "MINIMAX_M2": (62 * 2 * 8 * 128 * 2, 229.0),
    "LLAVA_15_7B": (32 * 2 * 32 * 128 * 2, 7.06),
    "QWEN2_AUDIO_7B": (32 * 2 * 32 * 128 * 2, 8.40),
    "DBRX": (40 * 2 * 8 * 128 * 2, 131.6),
    "CHATGLM3_6B": (28 * 2 * 2 * 128 * 2, 6.24),
    "MINICPM3_4B": (62 * (256 + 32) * 2, 4.07),
    "BAICHUAN2_13B": (40 * 2 * 40 * 128 * 2, 13.9),
}
# The library has no class for these (or can't build it): their layers are told apart from the
# config alone, and their weights can't be counted.
NOT_COUNTED = {
    "ZAMBA2_2B": (9 * 2 * 32 * 160 * 2, "mamba"),
    "KIMI_LINEAR_48B": (7 * 576 * 2, "kda"),
    "MINIMAX_TEXT_01": (10 * 2 * 8 * 128 * 2, "linear_attention"),
    "RING_MINI_LINEAR": (4 * 2 * 4 * 128 * 2, "linear_attention"),
    "MIMO_V2_FLASH": ((9 * 4 + 39 * 8) * (192 + 128) * 2, "swa_head_dim"),
    "STEP_35_FLASH": (45 * 2 * 8 * 128 * 2, "attention_other_setting"),
    "NEMOTRON_SUPER_49B": (40 * 2 * 8 * 128 * 2, "block_configs"),
    "HUNYUAN_LARGE": (32 * 2 * 8 * 128 * 2, "use_cla"),
    "OPENELM_270M": ((5 * 3 + 7 * 4 + 4 * 5) * 2 * 64 * 2, "ffn_multipliers"),
}


def read(name: str, **overrides: object) -> ModelSpec:
    config = getattr(released, name, None) or getattr(released_too, name)
    return model_of_config(config, name, Overrides(**overrides)).model  # type: ignore[arg-type]


@pytest.mark.parametrize("name", COUNTED)
def test_kv_and_parameters_of_a_released_model(name: str) -> None:
    kv_bytes, billions = COUNTED[name]
    if name == "NEMOTRON_H_8B" and "sglang" in sys.modules:
        pytest.skip("SGLang, which is in this process, replaces a method of the library's class")
    model = read(name)
    assert model.kv_bytes_per_token == kv_bytes
    assert model.n_parameters / 1e9 == pytest.approx(billions, rel=0.005)
    assert model.n_active_parameters <= model.n_parameters


#: Billions of parameters of those that transformers has since 5.19, which SGLang 0.5.23 brings.
COUNTED_BY_LATER = {"ZAMBA2_2B": 2.66, "KIMI_LINEAR_48B": 49.1, "MIMO_V2_FLASH": 308.8}
IS_LATER = Version(metadata.version("transformers")) >= Version("5.19")


@pytest.mark.parametrize("name", NOT_COUNTED)
def test_a_model_whose_weights_cannot_be_counted(name: str) -> None:
    kv_bytes, why = NOT_COUNTED[name]
    if IS_LATER and name in COUNTED_BY_LATER:
        billions = COUNTED_BY_LATER[name]
        assert read(name).n_parameters / 1e9 == pytest.approx(billions, rel=0.005)
    else:
        with pytest.raises(ConfigError, match=why) as caught:
            read(name)
        assert "--parameters" in str(caught.value)
    model = read(name, parameters="48B:3B")
    assert model.kv_bytes_per_token == kv_bytes
    assert (model.n_parameters, model.n_active_parameters) == (48e9, 3e9)
    assert model.weight_bytes == 96e9


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_be_planned_is_refused_by_name(name: str) -> None:
    config, what = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        model_of_config(config, name, Overrides(parameters="1B"))
    assert what in str(caught.value).removeprefix(f"The config of {name!r}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        # As published, with an embedding that is looked up, not computed with.
        ("QWEN3_NEXT", 3.87),
        ("DEEPSEEK_V3", 37.6),
        ("LLAMA4_MAVERICK", 17.2),
        ("JAMBA", 12.1),
        ("GRANITE4_H_SMALL", 8.8),
        ("DBRX", 36.5),
        ("LONGCAT_FLASH", 27.9),
        ("NEMOTRON_3_NANO", 3.6),
        # Without its encoder of images.
        ("GEMMA3_4B", 3.88),
    ],
)
def test_parameters_that_a_token_uses(name: str, billions: float) -> None:
    assert read(name).n_active_parameters / 1e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize(
    ("name", "kept_layers", "attending", "beyond_bytes"),
    [
        # Layers that keep KV, that attend, and what stays of a token that left the windows.
        ("GEMMA3_4B", 34, 34, 5 * 2 * 4 * 256 * 2),
        ("GEMMA3N_E4B", 20, 35, 4 * 2 * 2 * 256 * 2),
        ("GPT_OSS_20B", 24, 24, 12 * 2 * 8 * 64 * 2),
        ("LLAMA4_MAVERICK", 48, 48, 12 * 2 * 8 * 128 * 2),
        ("MIMO_V2_FLASH", 48, 48, 9 * 4 * 320 * 2),
        ("RECURRENT_GEMMA_2B", 8, 8, 0),
        ("QWEN25_VL_7B", 28, 28, 28 * 2 * 4 * 128 * 2),
        ("FALCON_H1_34B", 72, 72, 72 * 2 * 4 * 128 * 2),
    ],
)
def test_windows_and_shared_kv(
    name: str, kept_layers: int, attending: int, beyond_bytes: int
) -> None:
    model = read(name, parameters="10B")
    assert (model.n_kv_layers, model.n_attention_layers) == (kept_layers, attending)
    assert model.kv_bytes_per_token - model.window_kv_bytes_per_token == beyond_bytes


@pytest.mark.parametrize(
    ("name", "n_ranks", "copies"),
    [
        ("QWEN3_NEXT", 1, 1), ("QWEN3_NEXT", 2, 1), ("QWEN3_NEXT", 8, 4), ("GPT_OSS_20B", 8, 1),
        ("DEEPSEEK_V3", 8, 8), ("DEEPSEEK_V32", 4, 4),
    ],
)  # fmt: skip
def test_ranks_keep_whole_heads_and_whole_latents(name: str, n_ranks: int, copies: int) -> None:
    model = read(name)
    assert model.on_group(n_ranks).kv_bytes_per_token == copies * model.kv_bytes_per_token


def test_heads_may_be_shared_out_in_some_layers_only() -> None:
    # 9 layers of 4 heads, 39 of 8.
    kept = read("MIMO_V2_FLASH", parameters="309B:15B").on_group(8).kv_bytes_per_token
    assert kept == (9 * 8 + 39 * 8) * 320 * 2


def test_elements_of_kv_may_be_smaller_but_not_the_indexers() -> None:
    model = read("DEEPSEEK_V32", kv_bytes=1.0)
    assert model.kv_bytes_per_token == 61 * (576 + 132)


def test_layers_of_their_own_sizes_count_however_they_are_written() -> None:
    """Gemma 4's as transformers up to 5.18 writes them, and as it does from 5.19 on."""
    layers = ["sliding_attention", "full_attention"] * 2
    config = {
        "architectures": ["X"], "model_type": "x", "num_hidden_layers": 4, "hidden_size": 64,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "sliding_window": 32,
        "intermediate_size": 128, "vocab_size": 100, "layer_types": layers,
    }  # fmt: skip
    later = {"per_layer_config": {"01": {"head_dim": 32}, "03": {"head_dim": 32}}}
    found = [
        model_of_config({**config, **more}, "x", Overrides(parameters="1B")).model
        for more in ({"global_head_dim": 32}, later)
    ]
    assert found[0].kv_bytes_per_token == found[1].kv_bytes_per_token == 2 * 4 * 2 * (16 + 32) * 2
