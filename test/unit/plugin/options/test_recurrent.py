"""What goes with recurrent state, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from support_plugin import on_release
from tiered_kv.core.errors import ConfigError
from tiered_kv.plugin.options import recurrent
from tiered_kv.plugin.start.server_args import ServerArgs
from tiered_kv.plugin.upstream.current import arguments as of_release


def arguments(**changes: Any) -> Any:
    given = {
        "uses_mamba_radix_cache": True, "enable_mixed_chunk": False,
        "chunked_prefill_size": 2048, "enable_linear_replayssm": False,
        "enable_int8_mamba_checkpoint": False, "mamba_radix_cache_strategy": "auto",
        "tiered_kv_store": None, "tiered_kv_host_format": "raw", "tiered_kv_disk_format": "same",
        "tiered_kv_iteration_policy": "all", "enable_deterministic_inference": False,
    }  # fmt: skip
    args = SimpleNamespace(**{**given, **changes})
    recurrent.choose_strategy(args)
    return args


def test_the_plain_case_is_served(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        recurrent.check_resolved(arguments())
    assert "scheduling does not overlap with passes" in caplog.text


@pytest.mark.parametrize(
    "changes",
    [
        {"enable_mixed_chunk": True},
        {"enable_deterministic_inference": True},
        {"chunked_prefill_size": -1},
        {"enable_linear_replayssm": True},
        {"enable_int8_mamba_checkpoint": True},
        {"mamba_radix_cache_strategy": "extra_buffer"},
        {"tiered_kv_store": "valkey://somewhere:1"},
        {"tiered_kv_host_format": "fp8"},
        {"tiered_kv_disk_format": "int4"},
        {"tiered_kv_iteration_policy": "slack"},
    ],
    ids=str,
)
def test_what_was_not_tried_is_refused_but_for_other_models(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^--tiered-kv does not support, for models with rec"):
        recurrent.check_resolved(arguments(**changes))
    recurrent.check_resolved(arguments(**changes, uses_mamba_radix_cache=False))


def test_a_pool_that_nobody_knows_is_refused() -> None:
    pool = SimpleNamespace(mamba_pool=None)
    allocator = SimpleNamespace(get_kvcache=lambda: None)
    params = SimpleNamespace(req_to_token_pool=pool, token_to_kv_pool_allocator=allocator)
    args = arguments(disable_overlap_schedule=True)
    model = SimpleNamespace(is_multimodal=False)
    ctx = SimpleNamespace(is_hybrid_ssm=False, params=params, server_args=args, model_config=model)
    recurrent.check_model(ctx)
    ctx.is_hybrid_ssm = True
    with pytest.raises(ConfigError, match="does not know the pool SimpleNamespace of this model's"):
        recurrent.check_model(ctx)
    model.is_multimodal = True
    with pytest.raises(ConfigError, match="recurrent state that take images"):
        recurrent.check_model(ctx)
    args.disable_overlap_schedule = False
    with pytest.raises(ConfigError, match="SGLang itself has no prefix cache for"):
        recurrent.check_model(ctx)


def test_pages_may_have_more_than_one_token_without_overlap(tmp_path: Path) -> None:
    """SGLang's own tree wants one, and overlap to be off; ours has that switched off."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Lfm2Config(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
        architectures=["Lfm2ForCausalLM"],
    )
    config.save_pretrained(tmp_path)
    own = {"tiered_kv": True, "tiered_kv_disk_dir": "none"}
    args = on_release.resolve(ServerArgs(model_path=str(tmp_path), device="cpu", **own))
    outcome = of_release.resolved(args)
    assert outcome.uses_mamba_radix_cache
    assert outcome.mamba_radix_cache_strategy == recurrent.STRATEGY
    assert outcome.disable_overlap_schedule
    assert outcome.page_size == 64
