"""Reads a decoder's shape from a Hugging Face `config.json`, and counts its parameters.

The dialects understood are those of Llama-like models (Llama, Mistral, Qwen2/3, Gemma, Phi-3, ...),
of the first Qwen, of GPT-2-like names (`n_embd`, `n_head`, ...), of multi-query Falcon, of
mixtures of experts (Mixtral, Qwen-MoE, DeepSeek, Llama 4) and of multi-head latent attention
(DeepSeek); those of layers without KV are `model_layers`'.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tiered_kv.core.config_reader import ConfigReader, language_model
from tiered_kv.core.errors import ConfigError
from tiered_kv.core.model_experts import Experts, read_experts
from tiered_kv.core.model_kv import HEAD_DIM, HEADS, HIDDEN, KVLayers, kv_heads, read_kv_layers
from tiered_kv.core.model_layers import refuse_states
from tiered_kv.core.model_state import state_bytes

# fmt: off
_UNGATED_MLP = frozenset(
    {
        "gpt2", "gpt_neox", "gptj", "gpt_bigcode", "opt", "bloom", "falcon", "phi",
        "starcoder2", "codegen", "mpt", "nemotron",
    }
)
_QKV_BIAS = frozenset(
    {
        "qwen", "qwen2", "qwen2_moe", "qwen2_vl", "gpt2", "gpt_neox", "gpt_bigcode", "opt",
        "phi",
    }
)
_TIED_BY_DEFAULT = frozenset(
    {
        "gpt2", "gpt_bigcode", "gemma", "gemma2", "gemma3", "gemma3_text", "cohere",
    }
)
_UNEVEN = (
    "block_configs", "attention_other_setting", "swa_head_dim", "swa_num_attention_heads",
    "swa_num_key_value_heads", "global_head_dim", "num_kv_shared_layers", "use_cla",
    "num_attention_heads_per_layer", "num_key_value_heads_per_layer", "ffn_multipliers",
    "cross_attention_layers", "hidden_size_per_layer_input", "index_topk", "loop_num",
    "share_q_dim", "use_residual", "zero_expert_num", "per_layer_config",
)
# fmt: on
_WIDTHS = re.compile(r"_heads$|intermediate_size|_groups$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes in a config, under one set of names; `ModelSpec` documents those it shares."""

    name: str
    n_layers: int
    hidden_size: int
    intermediate_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool
    mlp_matrices: int
    """3 with a gate (SwiGLU and its kin), 2 without."""
    qkv_bias: bool
    kv_layers: tuple[KVLayers, ...]
    without_kv: tuple[str, ...]
    """Kinds of the layers that keep no KV, one word each."""
    state_bytes: int = 0
    uneven: str = ""
    """The field by which layers differ in what is counted from one of them; empty if none does."""
    experts: Experts | None = None
    mla_kv_lora_rank: int = 0
    mla_rope_head_dim: int = 0
    mla_q_lora_rank: int = 0
    mla_v_head_dim: int = 0

    def count_parameters(self) -> tuple[int, int]:
        """All parameters, and those that one token uses. Raises ConfigError (see `count_parts`)."""
        parts = self.count_parts()
        total = sum(parts.values())
        if self.experts is None:
            return total, total
        share = self.experts.n_active / self.experts.n_experts
        return total, total - round(parts["experts"] * (1.0 - share))

    def count_parts(self) -> dict[str, int]:
        """Parameters of each kind of weight, in all layers together.

        Raises ConfigError if layers are of kinds whose weights a config.json does not give.
        """
        if self.without_kv or self.uneven:
            why = f"layers without attention ({', '.join(sorted(set(self.without_kv)))})"
            if self.uneven:
                why = f"{self.uneven}, which changes weights per layer"
            raise ConfigError(
                f"The config of {self.name!r} has {why}, and these can't be counted from it; say "
                "how many parameters the model has (--parameters 48B, or 48B:3B with those that a "
                "token uses)."
            )
        hidden, experts = self.hidden_size, self.experts
        mlp = self.mlp_matrices * hidden
        n_moe_layers = experts.n_layers if experts else 0
        embedding = self.vocab_size * hidden
        parts = {
            "embedding": embedding,
            "head": 0 if self.tied_embeddings else embedding,
            "attention": self.n_layers * self._attention_parameters(),
            "mlp": (self.n_layers - n_moe_layers) * mlp * self.intermediate_size,
            "other": (2 * self.n_layers + 1) * hidden,
        }
        if experts:
            parts["shared_experts"] = n_moe_layers * mlp * experts.shared_size
            parts["experts"] = n_moe_layers * mlp * experts.size * experts.n_experts
            parts["other"] += n_moe_layers * hidden * experts.n_experts
        return parts

    def _attention_parameters(self) -> int:
        """Parameters of one layer's Q, K, V and output projections."""
        hidden, heads = self.hidden_size, self.n_heads
        if not self.mla_kv_lora_rank:
            qkv = (heads + 2 * self.n_kv_heads) * self.head_dim
            return hidden * qkv + heads * self.head_dim * hidden + (qkv if self.qkv_bias else 0)
        rank, rope = self.mla_kv_lora_rank, self.mla_rope_head_dim
        if self.mla_q_lora_rank:
            query = self.mla_q_lora_rank * (hidden + heads * self.head_dim + 1)
        else:
            query = hidden * heads * self.head_dim
        compress = hidden * (rank + rope) + rank
        expand = rank * heads * (self.head_dim - rope + self.mla_v_head_dim)
        return query + compress + expand + heads * self.mla_v_head_dim * hidden


def read_shape(config: Mapping[str, Any], name: str) -> Shape:
    """The shape that `config`, a parsed config.json, describes; `name` is for error messages.

    A config that nests its language model (`text_config` and its like) is read there. Raises
    ConfigError, in one sentence, if a size is missing or no number, or if a layer is of a kind of
    which it isn't known what it keeps.
    """
    config = language_model(config)
    reader = ConfigReader(config, name)
    _refuse_encoders(reader)
    model_type = str(config.get("model_type", ""))
    hidden = reader.need(*HIDDEN)
    layers = reader.n_layers()
    heads = max(reader.each(layers, "num_query_heads", *HEADS))
    if not heads:
        refuse_states(reader)
        reader.need(*HEADS)
    latent = _latent_attention(reader, hidden // heads)
    head_dim = latent.pop("head_dim", 0) or reader.take(*HEAD_DIM)
    if not head_dim:
        if hidden % heads:
            raise reader.error(
                f"has a hidden_size of {hidden}, which does not divide into {heads} heads; add "
                "head_dim"
            )
        head_dim = hidden // heads
    mla_elements = latent.get("mla_kv_lora_rank", 0) + latent.get("mla_rope_head_dim", 0)
    kv_layers, without_kv = read_kv_layers(reader, layers, mla_elements)
    experts = read_experts(reader, layers)
    return Shape(
        name=name,
        n_layers=layers,
        hidden_size=hidden,
        intermediate_size=_intermediate_size(reader, experts, hidden),
        n_heads=heads,
        n_kv_heads=kv_heads(config, reader, heads),
        head_dim=head_dim,
        vocab_size=reader.need("vocab_size", "padded_vocab_size"),
        tied_embeddings=bool(config.get("tie_word_embeddings", model_type in _TIED_BY_DEFAULT)),
        mlp_matrices=2 if model_type in _UNGATED_MLP else 3,
        qkv_bias=bool(config.get("attention_bias", model_type in _QKV_BIAS)),
        kv_layers=kv_layers,
        without_kv=without_kv,
        state_bytes=state_bytes(reader, without_kv),
        uneven=_uneven(config),
        experts=experts,
        **latent,
    )


def _uneven(config: Mapping[str, Any]) -> str:
    for key in _UNEVEN:
        if config.get(key):
            return key
    for key, value in config.items():
        if (
            _WIDTHS.search(key)
            and isinstance(value, list | tuple)
            and len(set(map(repr, value))) > 1
        ):
            return key
    return ""


def _refuse_encoders(reader: ConfigReader) -> None:
    config = reader.config
    if config.get("is_encoder_decoder"):
        raise reader.error("is an encoder-decoder's; only decoders can be planned")
    architecture = str((reader.listed("architectures") or [""])[0])
    is_bidirectional = config.get("use_bidirectional_attention") and architecture.endswith("Model")
    if is_bidirectional or config.get("is_causal") is False:
        raise reader.error("is an encoder's, for its tokens see those after them: it keeps no KV")
    # Encoders of BERT's kind have token types, and keep no KV.
    if config.get("type_vocab_size") and not config.get("is_decoder"):
        raise reader.error(f"is an encoder's ({architecture or 'BERT-like'}), which keeps no KV")


def _intermediate_size(reader: ConfigReader, experts: Experts | None, hidden: int) -> int:
    """Width of a dense MLP."""
    size = reader.take(
        "intermediate_size_mlp", "dense_intermediate_size", "intermediate_size", "n_inner",
        "ffn_hidden_size", "ffn_dim",
    )  # fmt: skip
    if reader.config.get("model_type") == "qwen":
        # The first Qwen writes the width of gate and up projection together.
        size //= 2
    # GPT-2 leaves it out, meaning four times the hidden size.
    return size or (experts.size if experts else 0) or 4 * hidden


def _latent_attention(reader: ConfigReader, usual_head_dim: int) -> dict[str, int]:
    """The fields of multi-head latent attention; empty without it."""
    rank = reader.take("kv_lora_rank")
    if not rank or reader.config.get("use_mla") is False:
        return {}
    rope = reader.need("qk_rope_head_dim")
    nope = reader.need("qk_nope_head_dim")
    return {
        "head_dim": nope + rope,
        "mla_kv_lora_rank": rank,
        "mla_rope_head_dim": rope,
        "mla_q_lora_rank": reader.take("q_lora_rank"),
        "mla_v_head_dim": reader.take("v_head_dim") or usual_head_dim,
    }
