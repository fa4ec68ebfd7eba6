"""Tiny random models of the architectures in `support_plan/architectures.py`, for real servers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from support_plan.architectures import ARCHITECTURES, Shape

#: Of all of these models.
VOCABULARY = 512

_EXPERTS: Shape = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
_HEADS_ALIKE: Shape = {"num_key_value_heads": 4}
_YARN: Shape = {
    # SGLang has no other positions for latents on a CPU.
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
        "original_max_position_embeddings": 512, "beta_fast": 32, "beta_slow": 1,
        "mscale": 0.707, "mscale_all_dim": 0.707,
    },
}  # fmt: skip
_VISION: Shape = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
#: What a server needs beside the shape that the planner counts.
_SERVED: dict[str, Shape] = {
    "Qwen2MoeForCausalLM": {**_EXPERTS, "shared_expert_intermediate_size": 64},
    "Qwen3MoeForCausalLM": _EXPERTS,
    # SGLang goes by the head count of the published ones, and by four times the hidden size.
    "PhiForCausalLM": {**_HEADS_ALIKE, "intermediate_size": 512},
    "OlmoeForCausalLM": {**_HEADS_ALIKE, "num_experts": 4, "num_experts_per_tok": 2},
    "PersimmonForCausalLM": _HEADS_ALIKE,
    "Glm4ForCausalLM": {"pad_token_id": 0},
    "Glm4MoeForCausalLM": {**_EXPERTS, "n_group": 1, "topk_group": 1},
    "MiniMaxM2ForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "GptOssForCausalLM": {"num_experts_per_tok": 2},
    "GPT2LMHeadModel": {"vocab_size": VOCABULARY},
    "Gemma3ForConditionalGeneration": {"vision_config": {**_VISION, "image_size": 56}},
    "Llama4ForConditionalGeneration": {
        "vision_config": {
            **_VISION,
            "image_size": 56,
            "vision_output_dim": 64,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
        },
    },
    "DeepseekV2ForCausalLM": {**_YARN, "moe_layer_freq": 1},
    "DeepseekV3ForCausalLM": _YARN,
}
#: The same, of what lies in `text_config`.
_TEXT: dict[str, Shape] = {
    "Llama4ForConditionalGeneration": {
        # Maverick's: where queries and keys have a norm, SGLang computes that in bfloat16.
        "use_qk_norm": False,
        "interleave_moe_layer_step": 2,
        "num_local_experts": 4,
        "intermediate_size_mlp": 256,
        "attention_chunk_size": 64,
        "no_rope_layer_interval": 4,
    },
}
#: What published configurations say, and those that transformers writes do not.
_PUBLISHED: dict[str, dict[str, Any]] = {
    "DeepseekV3ForCausalLM": {
        "moe_layer_freq": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
    },
    "Exaone4ForCausalLM": {"sliding_window_pattern": "LLLG"},
    "Gemma2ForCausalLM": {"hidden_act": "gelu_pytorch_tanh"},
    "MiniMaxM2ForCausalLM": {"scoring_func": "sigmoid", "use_routing_bias": True},
}


#: Embeddings as small as beside a real model's many layers: they are the output's as well, and
#: a model that does little else says its last token again.
_SMALL_EMBEDDINGS = ("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForConditionalGeneration")


def tiny(architecture: str, model: Path, to: Path) -> Path:
    """Random weights of this architecture, `model`'s tokenizer, `VOCABULARY` tokens of it."""
    import torch
    import transformers

    name, shape = ARCHITECTURES[architecture]
    shutil.copytree(model, to, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    shape = {**shape, **_SERVED.get(architecture, {})}
    # Wide enough that answers depend on the prompt and the best token stands out.
    common = {"initializer_range": 0.1, "bos_token_id": 1, "eos_token_id": 2, "dtype": "float32"}
    kind = transformers.AutoModelForCausalLM
    if "text_config" in shape:
        kind = transformers.AutoModelForImageTextToText
        text = {**shape["text_config"], **_TEXT.get(architecture, {}), **common}
        shape = {**shape, "text_config": text}
    config = getattr(transformers, name)(**shape, **common)
    torch.manual_seed(0)
    made = kind.from_config(config)
    if architecture in _SMALL_EMBEDDINGS:
        made.get_input_embeddings().weight.data *= 0.3
    made.save_pretrained(to)
    _drop_vision(to)
    written = json.loads((to / "config.json").read_text())
    written |= {"architectures": [architecture], **_PUBLISHED.get(architecture, {})}
    (to / "config.json").write_text(json.dumps(written))
    return to


def _drop_vision(folder: Path) -> None:
    """Nobody looks: SGLang serves these models without images, and calls that part otherwise."""
    from safetensors.torch import load_file, save_file

    (weights,) = folder.glob("*.safetensors")
    tensors = load_file(weights)
    seen = {name: part for name, part in tensors.items() if "vision" not in name}
    if len(seen) < len(tensors):
        save_file(seen, weights, metadata={"format": "pt"})
