"""What is refused beside stages of a pipeline."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tiered_kv.core.errors import ConfigError
from tiered_kv.plugin.options import cascade, pipeline
from tiered_kv.plugin.upstream.current import arguments


def resolved(stages: int = 2, **others: Any) -> Any:
    plain = {
        "pp_size": stages, "dp_size": 1, "enable_dp_attention": False, "attn_dp_size": 1,
        "tiered_kv_iteration_policy": "all", "enable_mixed_chunk": False, "enable_lora": None,
        "speculative_algorithm": None, "uses_mamba_radix_cache": False, "device": "cpu",
        "enable_deterministic_inference": False, "enable_torch_compile": False,
        "disaggregation_mode": "null", "enable_dynamic_chunking": False,
        "pp_async_batch_depth": 0, "enable_memory_saver": False, "kv_events_config": None,
        "tiered_kv_store": None, "tiered_kv_host_format": "raw", "tiered_kv_disk_format": "same",
        "tiered_kv_cascade": "auto", "tiered_kv_policy": None,
    }  # fmt: skip
    return SimpleNamespace(**plain | others)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"tiered_kv_iteration_policy": "slack"}, "--tiered-kv-iteration-policy"),
        ({"uses_mamba_radix_cache": True}, "recurrent state"),
        ({"dp_size": 2}, "--dp-size above 1"),
        ({"enable_dp_attention": True}, "--enable-dp-attention"),
        ({"speculative_algorithm": "NGRAM"}, "--speculative-algorithm"),
        ({"disaggregation_mode": "prefill"}, "--disaggregation-mode"),
        ({"enable_mixed_chunk": True}, "--enable-mixed-chunk"),
        ({"enable_dynamic_chunking": True}, "--enable-dynamic-chunking"),
        ({"pp_async_batch_depth": 1}, "--pp-async-batch-depth above 0"),
        ({"enable_lora": True}, "--enable-lora"),
        ({"enable_memory_saver": True}, "--enable-memory-saver"),
        ({"kv_events_config": "{}"}, "--kv-events-config"),
        ({"tiered_kv_store": "file:///tmp"}, "--tiered-kv-store"),
        ({"tiered_kv_host_format": "fp8"}, "in fewer bytes"),
        ({"tiered_kv_cascade": "on"}, "--tiered-kv-cascade on"),
    ],
)
def test_one_sentence_for_each(option: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"with --pp-size above 1, .*{said}.*; drop one of both"):
        pipeline.check_resolved(resolved(**option))
    pipeline.check_resolved(resolved(stages=1, **option))
    pipeline.check_resolved(resolved())


def test_the_queue_is_sglangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "RAN_PIPELINES", True)
    for stages, named, chosen in (
        (2, None, "upstream"),
        (2, "upstream", "upstream"),
        (1, None, None),
    ):
        args = resolved(stages, tiered_kv_policy=named)
        pipeline.choose_policy(args)
        assert args.tiered_kv_policy == chosen
    with pytest.raises(ConfigError, match="with --pp-size above 1, --tiered-kv-policy slack; drop"):
        pipeline.choose_policy(resolved(tiered_kv_policy="slack"))


def test_a_release_it_was_not_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "RAN_PIPELINES", False)
    with pytest.raises(ConfigError, match="--pp-size above 1 on this release of SGLang"):
        pipeline.choose_policy(resolved())
    pipeline.choose_policy(resolved(stages=1))


def test_multimodal_models() -> None:
    def context(stages: int, *, is_multimodal: bool) -> Any:
        model = SimpleNamespace(is_multimodal=is_multimodal)
        return SimpleNamespace(params=SimpleNamespace(pp_size=stages), model_config=model)

    with pytest.raises(ConfigError, match="--pp-size above 1 with multimodal models"):
        pipeline.check_model(context(2, is_multimodal=True))
    pipeline.check_model(context(1, is_multimodal=True))
    pipeline.check_model(context(2, is_multimodal=False))


def test_no_cascade(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "resolved", lambda args: args)
    monkeypatch.setattr(arguments, "attention_backends", lambda args: ("torch_native",) * 2)
    assert cascade.why_not(resolved()) == "--pp-size above 1"
    assert cascade.why_not(resolved(stages=1)) is None
