"""Reads a decoder's shape from a Hugging Face `config.json`, and counts its parameters.

The dialects understood are those of Llama-like models (Llama, Mistral, Qwen2/3, Gemma, Phi-3, ...),
of the first Qwen, of GPT-2-like names (`n_embd`, `n_head`, ...), of multi-query Falcon, of
mixtures of experts (Mixtral, Qwen-MoE, DeepSeek) and of multi-head latent attention (DeepSeek).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tiered_kv.core.errors import ConfigError

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
# fmt: on
_WITHOUT_ATTENTION = frozenset({"linear_attention", "mamba", "recurrent", "conv"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes in a config, under one set of names; `ModelSpec` documents those it shares."""

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
    n_experts: int = 0
    n_active_experts: int = 0
    expert_size: int = 0
    shared_expert_size: int = 0
    """Width of the experts that every token uses, together."""
    n_dense_layers: int = 0
    """Leading layers of a mixture of experts that have a dense MLP."""
    mla_kv_lora_rank: int = 0
    mla_rope_head_dim: int = 0
    mla_q_lora_rank: int = 0
    mla_v_head_dim: int = 0

    def count_parameters(self) -> tuple[int, int]:
        """All parameters, and those that one token uses."""
        hidden = self.hidden_size
        mlp = self.mlp_matrices * hidden
        n_moe_layers = self.n_layers - self.n_dense_layers if self.n_experts else 0
        every_token = (
            self.vocab_size * hidden * (1 if self.tied_embeddings else 2)
            + self.n_layers * (self._attention_parameters() + 2 * hidden)
            + (self.n_layers - n_moe_layers) * mlp * self.intermediate_size
            + n_moe_layers * (mlp * self.shared_expert_size + hidden * self.n_experts)
            + hidden
        )
        one_expert = n_moe_layers * mlp * self.expert_size
        return (
            every_token + one_expert * self.n_experts,
            every_token + one_expert * self.n_active_experts,
        )

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

    A config that nests its language model (`text_config`) is read there. Raises ConfigError, in one
    sentence, if a size is missing or no number, or if layers are something else than attention.
    """
    nested = config.get("text_config", config.get("llm_config"))
    if isinstance(nested, Mapping) and "num_hidden_layers" in nested:
        # What a nested config leaves out, such as tied embeddings, stands on the outside.
        config = {**config, **nested}
    reader = _Reader(config, name)
    reader.refuse_other_layers()
    model_type = str(config.get("model_type", ""))
    hidden = reader.need("hidden_size", "n_embd", "d_model")
    heads = reader.need("num_attention_heads", "n_head", "n_heads")
    layers = reader.need("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    latent = _latent_attention(reader)
    head_dim = latent.pop("head_dim", 0) or reader.take("head_dim", "kv_channels")
    if not head_dim:
        if hidden % heads:
            raise ConfigError(
                f"The config of {name!r} has a hidden_size of {hidden}, which does not divide into "
                f"{heads} heads; add head_dim."
            )
        head_dim = hidden // heads
    intermediate = reader.take("intermediate_size", "n_inner", "ffn_hidden_size", "ffn_dim")
    if model_type == "qwen":
        # The first Qwen writes the width of gate and up projection together.
        intermediate //= 2
    experts = _experts(reader, layers)
    return Shape(
        n_layers=layers,
        hidden_size=hidden,
        # GPT-2 leaves it out, meaning four times the hidden size.
        intermediate_size=intermediate or experts.get("expert_size", 0) or 4 * hidden,
        n_heads=heads,
        n_kv_heads=_kv_heads(reader, heads),
        head_dim=head_dim,
        vocab_size=reader.need("vocab_size", "padded_vocab_size"),
        tied_embeddings=bool(config.get("tie_word_embeddings", model_type in _TIED_BY_DEFAULT)),
        mlp_matrices=2 if model_type in _UNGATED_MLP else 3,
        qkv_bias=bool(config.get("attention_bias", model_type in _QKV_BIAS)),
        **experts,
        **latent,
    )


class _Reader:
    """Takes sizes out of a config, whatever they are called there."""

    def __init__(self, config: Mapping[str, Any], name: str) -> None:
        self.config = config
        self.name = name

    def take(self, *keys: str) -> int:
        """The first of `keys` that the config has; 0 if it has none. Raises ConfigError."""
        for key in keys:
            value = self.config.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigError(
                    f"The config of {self.name!r} has {key} = {value!r}, which is not a whole "
                    "number of at least 0; correct it."
                )
            return value
        return 0

    def need(self, *keys: str) -> int:
        """Like `take`, but the size must be there and positive."""
        value = self.take(*keys)
        if not value:
            raise ConfigError(
                f"The config of {self.name!r} has no {keys[0]}; give a decoder's config.json."
            )
        return value

    def refuse_other_layers(self) -> None:
        """Raise ConfigError if some layers keep a state instead of KV."""
        kinds = self.config.get("layer_types") or ()
        strange = sorted(_WITHOUT_ATTENTION.intersection(kinds))
        if strange:
            raise ConfigError(
                f"The config of {self.name!r} has {strange[0]} layers, which keep no KV per token; "
                "only models whose layers are all attention can be planned."
            )


def _kv_heads(reader: _Reader, n_heads: int) -> int:
    config = reader.config
    if config.get("model_type") == "falcon" and not config.get("new_decoder_architecture"):
        # Its first generation says num_kv_heads too, but doesn't mean it.
        return 1 if config.get("multi_query") else n_heads
    kv_heads = reader.take("num_key_value_heads", "multi_query_group_num", "num_kv_heads")
    if kv_heads:
        return kv_heads
    return 1 if config.get("multi_query") else n_heads


def _latent_attention(reader: _Reader) -> dict[str, int]:
    """The fields of multi-head latent attention; empty without it."""
    rank = reader.take("kv_lora_rank")
    if not rank:
        return {}
    rope = reader.need("qk_rope_head_dim")
    nope = reader.need("qk_nope_head_dim")
    return {
        "head_dim": nope + rope,
        "mla_kv_lora_rank": rank,
        "mla_rope_head_dim": rope,
        "mla_q_lora_rank": reader.take("q_lora_rank"),
        "mla_v_head_dim": reader.need("v_head_dim"),
    }


def _experts(reader: _Reader, n_layers: int) -> dict[str, int]:
    """The fields of a mixture of experts; empty for a dense model."""
    n_experts = reader.take("n_routed_experts", "num_local_experts", "num_experts")
    if n_experts < 2:
        return {}
    expert_size = reader.need("moe_intermediate_size", "intermediate_size")
    shared = reader.take("shared_expert_intermediate_size")
    return {
        "n_experts": n_experts,
        "n_active_experts": reader.need("num_experts_per_tok", "num_experts_per_token"),
        "expert_size": expert_size,
        "shared_expert_size": shared or reader.take("n_shared_experts") * expert_size,
        "n_dense_layers": min(n_layers, reader.take("first_k_dense_replace")),
    }
