"""What a token of each architecture takes: the planner's figure is that of SGLang's own pool."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from support_plan.architectures import ARCHITECTURES, Shape
from support_plugin import on_release
from tiered_kv.core.model_spec import ModelSpec

pytestmark = pytest.mark.skipif(
    not on_release.IS_0_5_17, reason="0.5.23 sizes its pools by other records"
)

#: In bytes: of these shapes, 2 heads of 32, keys and values, on 4 layers, in float32.
LEAST = 2 * 32 * 2 * 4 * 4


def written_config(folder: Path, architecture: str, config: str, shape: Shape) -> Path:
    transformers = pytest.importorskip("transformers")
    made = getattr(transformers, config)(**shape, architectures=[architecture], dtype="float32")
    made.save_pretrained(folder)
    return folder


def bytes_in_pool(folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """What SGLang's pool allocates for a token, all layers together, in float32 on one rank."""
    from sglang.srt.configs.model_config import AttentionArch, ModelConfig
    from sglang.srt.model_executor import pool_configurator

    model = ModelConfig(str(folder), dtype="float32", disable_hybrid_swa_memory=True)
    nothing = SimpleNamespace(
        is_eagle=lambda: False, is_standalone=lambda: False, is_dflash_family=lambda: False
    )
    args = {"enable_hisparse": False, "enable_dsa_cache_layer_split": False}
    args |= {"kv_cache_dtype": "auto", "max_total_tokens": 1, "attention_backend": "triton"}
    kvc: Any = SimpleNamespace(
        model_config=model,
        kv_cache_dtype=torch.float32,
        kv_cache_dtype_str="auto",
        layer_info=SimpleNamespace(
            start_layer=0,
            end_layer=model.num_hidden_layers,
            num_effective_layers=model.num_attention_layers,
        ),
        use_mla_backend=model.attention_arch == AttentionArch.MLA,
        server_args=SimpleNamespace(**args, dcp_size=1),
        spec_algorithm=nothing,
        is_draft_worker=False,
        ps=SimpleNamespace(pp_size=1),
        model_dtype=torch.float32,
    )
    one_rank = SimpleNamespace(attn_tp_size=1)
    monkeypatch.setattr(pool_configurator, "get_parallel", lambda: one_rank)
    return int(pool_configurator.DefaultPoolConfigurator(kvc)._cell_size)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_planner_counts_what_the_pool_allocates(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = written_config(tmp_path, architecture, *ARCHITECTURES[architecture])
    config = json.loads((folder / "config.json").read_text())
    planned = ModelSpec.from_hf_config(config, name=architecture, kv_bytes_per_element=4.0)
    in_pool = bytes_in_pool(folder, monkeypatch)
    assert planned.kv_bytes_per_token == in_pool
    assert in_pool >= LEAST


def test_every_architecture_is_in_sglangs_registry() -> None:
    from sglang.srt import models

    sources = "".join(
        path.read_text() for path in Path(models.__path__[0]).glob("*.py") if path.stem[0] != "_"
    )
    missing = [name for name in ARCHITECTURES if f"class {name}" not in sources]
    assert not missing
