"""The configuration of a Llama small enough for anything, for where no weights are needed."""

from __future__ import annotations

import json
from pathlib import Path

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
    "torch_dtype": "float32",
}


def write_config(folder: Path, **changes: object) -> str:
    """Puts it into `folder`, for `--load-format dummy` or no model at all; returns the folder."""
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return str(folder)
