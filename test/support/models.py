"""Models beside the demo model: one that looks the same, one that two ranks can share."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any


def copy_with_other_weights(model: Path, to: Path) -> Path:
    """A model of the same name, shapes and tokenizer whose last layer was, say, fine-tuned."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, to, ignore=shutil.ignore_patterns("*.safetensors"))
    (weights,) = model.glob("*.safetensors")
    tensors = load_file(weights)
    name = max(n for n in tensors if n.endswith("mlp.down_proj.weight"))
    tensors[name] = tensors[name] * 1.01
    save_file(tensors, to / weights.name, metadata={"format": "pt"})
    return to


def tiny_model_for_two_ranks(model: Path, to: Path) -> Path:
    """Random weights, an even number of heads (the demo model has nine), `model`'s tokenizer."""
    return _tiny_llama(model, to, n_kv_heads=2)


def tiny_model_with_one_kv_head(model: Path, to: Path) -> Path:
    """Random weights, four heads that attend to the same keys and values, `model`'s tokenizer."""
    return _tiny_llama(model, to, n_kv_heads=1)


def tiny_model_for_two_stages(model: Path, to: Path) -> Path:
    """The same with five layers, of which two stages of a pipeline have two and three."""
    return _tiny_llama(model, to, n_kv_heads=2, n_layers=5)


def _tiny_llama(model: Path, to: Path, n_kv_heads: int, n_layers: int = 4) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    return _random_model(
        model,
        to,
        LlamaConfig,
        LlamaForCausalLM,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=n_kv_heads,
    )


#: Of models whose random drafts are to be right at times.
EAGLE_VOCABULARY = 64


def tiny_model_of_few_words(model: Path, to: Path) -> Path:
    """Random weights, `model`'s tokenizer, and the first tokens of its vocabulary alone.

    What its second layer says weighs little, so that a draft of one layer is often right.
    """
    from safetensors.torch import load_file, save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    _random_model(
        model,
        to,
        LlamaConfig,
        LlamaForCausalLM,
        vocab_size=EAGLE_VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    (weights,) = to.glob("*.safetensors")
    tensors = load_file(weights)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.1.{name}.weight"] *= 0.1
    save_file(tensors, weights, metadata={"format": "pt"})
    return to


def tiny_eagle_head(target: Path, to: Path) -> Path:
    """An EAGLE head for `tiny_model_of_few_words`: its first layer, over tokens alone."""
    import torch
    from safetensors.torch import load_file, save_file

    (weights,) = target.glob("*.safetensors")
    prefix = "model.layers.0."
    tensors = {
        f"layers.0.{name.removeprefix(prefix)}": tensor
        for name, tensor in load_file(weights).items()
        if name.startswith(prefix) and "input_layernorm" not in name
    }
    # The layer has no norm before its attention: embeddings have a size of 0.1.
    for name in ("q_proj", "k_proj", "v_proj"):
        tensors[f"layers.0.self_attn.{name}.weight"] *= 10
    config = json.loads((target / "config.json").read_text())
    hidden = config["hidden_size"]
    tensors["fc.weight"] = torch.cat((torch.eye(hidden), torch.zeros(hidden, hidden)), 1)
    tensors["fc.bias"] = torch.zeros(hidden)
    to.mkdir()
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    config |= {"num_hidden_layers": 1, "architectures": ["LlamaForCausalLMEagle"]}
    (to / "config.json").write_text(json.dumps(config))
    return to


def tiny_mla_model(model: Path, to: Path) -> Path:
    """Random weights in the shape of DeepSeek-V2 (MLA), `model`'s tokenizer."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    return _random_model(
        model,
        to,
        DeepseekV2Config,
        DeepseekV2ForCausalLM,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=96,
        q_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=32,
        # No layer of experts, though the fields that say what they would be.
        first_k_dense_replace=3,
        moe_layer_freq=1,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        # SGLang has no other positions for MLA on a CPU.
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 1024,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
        },
    )


def tiny_window_model(model: Path, to: Path) -> Path:
    """Random weights in the shape of Gemma 3: three layers of four look back 64 tokens only."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return _random_model(
        model,
        to,
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=64,
        sliding_window_pattern=4,
    )


def tiny_short_convolution_model(model: Path, to: Path) -> Path:
    """Random weights in the shape of LFM2: every other layer is a short convolution."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    return _random_model(
        model,
        to,
        Lfm2Config,
        Lfm2ForCausalLM,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention", "conv", "full_attention"],
        block_auto_adjust_ff_dim=False,
    )


def _random_model(model: Path, to: Path, config: Any, architecture: Any, **shape: Any) -> Path:
    """`architecture`, of transformers, with random weights in this shape, `model`'s tokenizer."""
    import torch

    shutil.copytree(model, to, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    theirs = json.loads((model / "config.json").read_text())
    ours = config(
        **{"vocab_size": theirs["vocab_size"], **shape},
        max_position_embeddings=4096,
        # Wide enough that answers depend on the prompt and the best token stands out.
        initializer_range=0.1,
        bos_token_id=theirs["bos_token_id"],
        eos_token_id=theirs["eos_token_id"],
        dtype="float32",
    )
    torch.manual_seed(0)
    architecture(ours).save_pretrained(to)
    return to


def random_lora_adapter(to: Path, seed: int) -> Path:
    """A PEFT adapter of rank 4 for the demo model's queries and values, strong enough to matter."""
    import torch
    from safetensors.torch import save_file

    from harness.demo_model import HEAD_DIM, HIDDEN, KV_HEADS, LAYERS, Q_HEADS

    generator = torch.Generator().manual_seed(seed)
    outputs = {"q_proj": Q_HEADS * HEAD_DIM, "v_proj": KV_HEADS * HEAD_DIM}
    tensors = {}
    for layer in range(LAYERS):
        for name, n_outputs in outputs.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(4, HIDDEN, generator=generator) * 0.05
            tensors[f"{prefix}.lora_B.weight"] = (
                torch.randn(n_outputs, 4, generator=generator) * 0.05
            )
    to.mkdir()
    save_file(tensors, to / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "bias": "none",
        "lora_dropout": 0.0, "target_modules": sorted(outputs), "base_model_name_or_path": "demo",
    }  # fmt: skip
    (to / "adapter_config.json").write_text(json.dumps(config))
    return to
