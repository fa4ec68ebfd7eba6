"""Models with sliding windows: one pool for all layers, or a sentence."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from support_plan.architectures import ARCHITECTURES
from tiered_kv.core.errors import ConfigError
from tiered_kv.plugin.options import windows
from tiered_kv.plugin.upstream.current import arguments

GPT_OSS = "GptOssForCausalLM"


class Arguments:
    """What is read and set of SGLang's."""

    model_path = "some-model"
    disable_hybrid_swa_memory = False


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """check(architecture, **fields): as at a start with such a model, SGLang having read it."""
    transformers = pytest.importorskip("transformers")
    from sglang.srt.configs.model_config import ModelConfig

    def start(architecture: str, *, as_class: str | None = None, **fields: Any) -> Any:
        config, shape = ARCHITECTURES[architecture]
        made = getattr(transformers, config)(
            **{**shape, **fields}, architectures=[as_class or architecture], dtype="float32"
        )
        made.save_pretrained(tmp_path)
        args = Arguments()
        windows.have_one_pool(args)
        model = ModelConfig(
            str(tmp_path),
            dtype="float32",
            disable_hybrid_swa_memory=args.disable_hybrid_swa_memory,
        )
        monkeypatch.setattr(arguments, "model_config", lambda _: model)
        windows.check_resolved(args)
        return model

    return start


def test_windows_share_the_pool_and_it_is_said_what_that_costs(
    check: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        model = check(GPT_OSS)
    assert not model.is_hybrid_swa
    assert "keep all of their KV, in one pool with the others" in caplog.text


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Gemma3ForCausalLM"])
def test_nothing_is_said_of_models_that_have_one_pool_anyway(
    check: Any, caplog: pytest.LogCaptureFixture, architecture: str
) -> None:
    with caplog.at_level(logging.INFO):
        assert not check(architecture).is_hybrid_swa
    assert "Tiered KV" not in caplog.text


@pytest.mark.parametrize(
    ("as_class", "fields"),
    [
        ("MiMoV2FlashForCausalLM", {"hybrid_layer_pattern": [0, 1, 0, 1]}),
        (GPT_OSS, {"v_head_dim": 32}),
    ],
    ids=["other heads", "narrower values"],
)
def test_layers_of_other_shapes_are_refused(
    check: Any, as_class: str, fields: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="keep KV of another shape than the others; start wi"):
        check(GPT_OSS, as_class=as_class, **fields)


def test_windows_of_compressed_attention_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    text = SimpleNamespace(architectures=["DeepseekV4ForCausalLM"])
    model = SimpleNamespace(
        hf_config=text, hf_text_config=text, is_hybrid_swa_compress=False, has_asymmetric_kv=False
    )
    monkeypatch.setattr(arguments, "model_config", lambda _: model)
    with pytest.raises(ConfigError, match="keep KV of another shape"):
        windows.check_resolved(Arguments())


def test_without_a_model_there_is_nothing_to_check() -> None:
    args = Arguments()
    args.model_path = "dummy"
    windows.check_resolved(args)
