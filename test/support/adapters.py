"""LoRA adapters of random weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

RANK = 4


def write_adapter(folder: Path, model: Path, seed: int) -> Path:
    """An adapter for the attention's inputs of `model`, strong enough to be noticed.

    Into `folder`, in place of what was there.
    """
    config = json.loads((model / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    kv_width = config["num_key_value_heads"] * head_dim
    widths = {"q_proj": heads * head_dim, "k_proj": kv_width, "v_proj": kv_width}
    random = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for module, width in widths.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            down, up = (RANK, hidden), (width, RANK)
            weights[f"{name}.lora_A.weight"] = torch.randn(down, generator=random) * 0.3
            weights[f"{name}.lora_B.weight"] = torch.randn(up, generator=random) * 0.3
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors")
    about = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "bias": "none",
        "lora_alpha": RANK, "lora_dropout": 0.0, "target_modules": list(widths),
        "base_model_name_or_path": str(model),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return folder
