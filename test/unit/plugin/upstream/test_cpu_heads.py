"""Heads on a CPU: those that ranks can share out stay as they are, others are padded by SGLang."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.configs.update_config import adjust_config_with_unaligned_cpu_tp

from support.tiny_llama import write_config
from tiered_kv.plugin.upstream import cpu_heads


@pytest.mark.parametrize(
    ("n_heads", "n_kv_heads", "n_ranks", "shared"),
    [
        (4, 1, 2, True),
        (8, 2, 4, True),
        (8, 2, 8, True),
        (4, 2, 2, False),  # Each rank has heads of its own.
        (9, 3, 2, False),
        (9, 1, 2, False),  # Nine heads on two ranks.
        (12, 2, 3, False),  # Two heads on three ranks.
    ],
)
def test_who_can_share(n_heads: int, n_kv_heads: int, n_ranks: int, shared: bool) -> None:
    assert cpu_heads.can_share(n_heads, n_kv_heads, n_ranks) is shared


@pytest.mark.parametrize(
    ("n_heads", "n_kv_heads", "heads_then"),
    [(4, 1, (4, 1, 1)), (4, 2, (4, 2, 1)), (9, 3, (12, 4, 2))],
)
def test_what_a_model_is_made_of(
    tmp_path: Path, n_heads: int, n_kv_heads: int, heads_then: tuple[int, int, int]
) -> None:
    """On two ranks; and what is not a head is padded in any case."""
    folder = write_config(
        tmp_path,
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads,
        hidden_size=16 * n_heads,
        intermediate_size=100,
    )
    model = ModelConfig(folder)
    changed = cpu_heads.keep_heads(adjust_config_with_unaligned_cpu_tp, model, LoadConfig(), 2)
    for config in (changed, changed.hf_config, changed.hf_text_config):
        assert (config.num_attention_heads, config.num_key_value_heads) == heads_then[:2]
    assert changed.get_num_kv_heads(2) == heads_then[2]
    assert changed.hf_config.intermediate_size == 128
    assert json.loads((tmp_path / "config.json").read_text())["intermediate_size"] == 100


def test_it_takes_upstreams_place_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.model_executor import model_runner

    calls: list[int] = []

    def pad(model_config: object, load_config: object, tp_size: int) -> object:
        calls.append(tp_size)
        return model_config

    monkeypatch.setattr(model_runner, "adjust_config_with_unaligned_cpu_tp", pad)
    cpu_heads.register()
    cpu_heads.register()
    model = SimpleNamespace(num_attention_heads=4, get_total_num_kv_heads=lambda: 4)
    assert model_runner.adjust_config_with_unaligned_cpu_tp(model, None, 2) is model
    assert calls == [2]
