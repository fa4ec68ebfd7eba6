"""What is refused beside DP attention."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tiered_kv.core.errors import ConfigError
from tiered_kv.plugin.options import cascade, dp_attention
from tiered_kv.plugin.upstream.current import arguments


def resolved(groups: int = 2, **others: Any) -> Any:
    """Arguments as either release has them."""
    plain = {
        "enable_dp_attention": groups > 1, "dp_size": groups, "attn_dp_size": groups,
        "tiered_kv_iteration_policy": "all", "enable_mixed_chunk": False, "enable_lora": None,
        "speculative_algorithm": None, "nnodes": 1, "uses_mamba_radix_cache": False,
        "device": "cpu", "enable_deterministic_inference": False, "enable_torch_compile": False,
        "pp_size": 1,
    }  # fmt: skip
    return SimpleNamespace(**plain | others)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"tiered_kv_iteration_policy": "slack"}, "--tiered-kv-iteration-policy"),
        ({"enable_mixed_chunk": True}, "--enable-mixed-chunk"),
        ({"speculative_algorithm": "NGRAM"}, "--speculative-algorithm"),
        ({"enable_lora": True}, "--enable-lora"),
        ({"nnodes": 2}, "--nnodes above 1"),
        ({"uses_mamba_radix_cache": True}, "recurrent state"),
    ],
)
def test_one_sentence_for_each(option: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"with DP attention, .*{said}.*; drop one of both"):
        dp_attention.check_resolved(resolved(**option))
    dp_attention.check_resolved(resolved(groups=1, **option))
    dp_attention.check_resolved(resolved())


def test_multimodal_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "resolved", lambda args: args)

    def context(groups: int, *, is_multimodal: bool) -> Any:
        model = SimpleNamespace(is_multimodal=is_multimodal)
        return SimpleNamespace(server_args=resolved(groups), model_config=model)

    with pytest.raises(ConfigError, match="DP attention with multimodal models"):
        dp_attention.check_model(context(2, is_multimodal=True))
    dp_attention.check_model(context(1, is_multimodal=True))
    dp_attention.check_model(context(2, is_multimodal=False))


def test_no_cascade(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "resolved", lambda args: args)
    monkeypatch.setattr(arguments, "attention_backends", lambda args: ("torch_native",) * 2)
    assert cascade.why_not(resolved()) == "DP attention"
    assert cascade.why_not(resolved(groups=1)) is None
