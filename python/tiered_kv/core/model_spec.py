"""What memory and cost figures need to know of a decoder model, and presets for common ones.

Presets and Hugging Face `config.json` files go through the same reader
(`tiered_kv.core.model_config`), which also counts the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tiered_kv.core.errors import ConfigError
from tiered_kv.core.model_config import Shape, read_shape
from tiered_kv.core.model_kv import KVLayers, share_apart


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One decoder model: enough to count bytes and FLOPs.

    On the device, layers that look back a window only are counted as if they looked back to the
    beginning (`window_kv_bytes_per_token` says how much that is). The
    state that layers without KV keep per request is not counted.
    """

    name: str
    """Name under which it is looked up and shown."""

    n_layers: int
    """Decoder layers."""

    hidden_size: int
    """Width of the residual stream."""

    intermediate_size: int
    """Width of a dense MLP, or of one expert in a mixture of experts."""

    n_heads: int
    """Query heads per layer."""

    n_kv_heads: int
    """Key/value heads per layer: equal to `n_heads` (MHA), fewer (GQA), one (MQA). The most that a
    layer has."""

    head_dim: int
    """Elements per query/key head; under MLA its two parts (without and with RoPE) together."""

    vocab_size: int
    """Rows of the embedding."""

    n_parameters: int
    """All parameters."""

    n_active_parameters: int
    """Parameters a token uses; below `n_parameters` only in a mixture of experts."""

    weight_bytes_per_parameter: float = 2.0
    """2 for bf16 and fp16, 1 for fp8, 4 for float32."""

    kv_bytes_per_element: float = 2.0
    """The same for the KV cache."""

    mla_kv_lora_rank: int = 0
    """Elements of the compressed latent per token and layer; non-zero means MLA."""

    mla_rope_head_dim: int = 0
    """Elements of the shared RoPE key per token and layer under MLA."""

    tied_embeddings: bool = False
    """Whether input and output embedding are one matrix."""

    kv_layers: tuple[KVLayers, ...] = ()
    """The layers that attend, in groups that keep equally much; empty if all layers do, and keep K
    and V of every KV head (under MLA the latent)."""

    kinds_without_kv: tuple[str, ...] = ()
    """What the layers are that don't attend, one word each: `mamba`, `linear_attention`."""

    state_bytes: int = 0
    """Of their recurrent state, in all layers, as SGLang keeps it by default: what a checkpoint
    takes. 0 if there is none, or it isn't known."""

    def __post_init__(self) -> None:
        positive = (
            "n_layers hidden_size intermediate_size n_heads n_kv_heads head_dim vocab_size "
            "n_parameters n_active_parameters weight_bytes_per_parameter kv_bytes_per_element"
        )
        for field in positive.split():
            value = getattr(self, field)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"The model {self.name!r} needs a positive {field}, not {value}.")
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"The model {self.name!r} has {self.n_heads} query heads, which do not divide into "
                f"its {self.n_kv_heads} KV heads; correct one of them."
            )

    @property
    def attending(self) -> tuple[KVLayers, ...]:
        """`kv_layers`, also where all layers are alike."""
        if self.kv_layers:
            return self.kv_layers
        # K and V of every KV head; under MLA one latent and one RoPE key (DeepSeek-V2, arXiv
        # 2405.04434, section 2.1.4).
        if self.mla_kv_lora_rank:
            return (KVLayers(self.n_layers, self.mla_kv_lora_rank + self.mla_rope_head_dim),)
        heads = self.n_kv_heads
        return (KVLayers(self.n_layers, 2 * heads * self.head_dim, heads),)

    @property
    def n_attention_layers(self) -> int:
        """Layers that attend to what came before."""
        return sum(layers.n_layers for layers in self.attending)

    @property
    def n_kv_layers(self) -> int:
        """Layers that keep KV of their own."""
        return sum(layers.n_layers for layers in self.attending if layers.kv_elements)

    @property
    def kv_bytes_per_token(self) -> float:
        """Bytes of KV cache that one token needs in all layers."""
        return sum(map(self._bytes_per_token, self.attending))

    @property
    def window_kv_bytes_per_token(self) -> float:
        """Those of them that a token needs only as long as it is within a layer's window."""
        return sum(
            self._bytes_per_token(layers) for layers in self.attending if layers.window_tokens
        )

    @property
    def stored_kv_bytes_per_token(self) -> float:
        """Bytes that a token takes on the host and below, on average over long prompts."""
        return sum(
            self._bytes_per_token(layers)
            * (share_apart(layers.window_tokens) if layers.is_sliding else 1.0)
            for layers in self.attending
        )

    def loaded_kv_bytes(self, n_tokens: int) -> float:
        """Bytes that are copied to the device for a prefix of `n_tokens`."""
        return sum(
            self._bytes_per_token(layers)
            * (min(n_tokens, layers.window_tokens) if layers.is_sliding else n_tokens)
            for layers in self.attending
        )

    @property
    def kv_bytes_per_token_layer(self) -> float:
        """The same in one layer, on average over those that keep any."""
        return self.kv_bytes_per_token / self.n_kv_layers

    def on_group(self, n_ranks: int) -> ModelSpec:
        """The model with the KV that `n_ranks` tensor-parallel ranks keep of a token together.

        More than the model's own where it has fewer KV heads than there are ranks: heads, and the
        latents of MLA, are kept by several ranks then.
        """
        return replace(self, kv_layers=tuple(layers.on_group(n_ranks) for layers in self.attending))

    def with_layers_alike(self) -> ModelSpec:
        """The model on a server that keeps layers with a window like all others."""
        alike = tuple(replace(layers, is_sliding=False) for layers in self.attending)
        return replace(self, kv_layers=alike)

    def _bytes_per_token(self, layers: KVLayers) -> float:
        per_layer = layers.kv_elements * self.kv_bytes_per_element + layers.other_bytes
        return layers.n_layers * per_layer

    @property
    def weight_bytes(self) -> float:
        """Bytes of all weights."""
        return self.n_parameters * self.weight_bytes_per_parameter

    @property
    def attention_kind(self) -> str:
        """ "MLA", "MHA", "MQA" or "GQA"."""
        if self.mla_kv_lora_rank:
            return "MLA"
        if self.n_kv_heads == self.n_heads:
            return "MHA"
        return "MQA" if self.n_kv_heads == 1 else "GQA"

    @classmethod
    def from_hf_config(
        cls,
        config: Mapping[str, Any],
        *,
        name: str,
        n_parameters: int | None = None,
        n_active_parameters: int | None = None,
        weight_bytes_per_parameter: float = 2.0,
        kv_bytes_per_element: float = 2.0,
    ) -> ModelSpec:
        """The model that a Hugging Face `config.json`, already parsed, describes.

        `n_parameters`, and for a mixture of experts `n_active_parameters`, override the counts
        derived from the shapes (weights only: biases other than those of Q, K and V are left out).
        The config's own data type is ignored: servers choose theirs. Raises ConfigError, in one
        sentence, for a config that lacks what is needed or describes layers of an unknown kind.
        """
        return cls.of_shape(
            read_shape(config, name),
            n_parameters=n_parameters,
            n_active_parameters=n_active_parameters,
            weight_bytes_per_parameter=weight_bytes_per_parameter,
            kv_bytes_per_element=kv_bytes_per_element,
        )

    @classmethod
    def of_shape(
        cls,
        shape: Shape,
        *,
        n_parameters: int | None = None,
        n_active_parameters: int | None = None,
        weight_bytes_per_parameter: float = 2.0,
        kv_bytes_per_element: float = 2.0,
    ) -> ModelSpec:
        """The same for a config that was read already."""
        if n_parameters is None:
            total, active = shape.count_parameters()
        else:
            total = n_parameters
            active = n_active_parameters or total
            if shape.experts and n_active_parameters is None:
                active = shape.count_parameters()[1]
        return cls(
            name=shape.name,
            n_layers=shape.n_layers,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.experts.size if shape.experts else shape.intermediate_size,
            n_heads=shape.n_heads,
            n_kv_heads=shape.n_kv_heads,
            head_dim=shape.head_dim,
            vocab_size=shape.vocab_size,
            n_parameters=total,
            n_active_parameters=active,
            weight_bytes_per_parameter=weight_bytes_per_parameter,
            kv_bytes_per_element=kv_bytes_per_element,
            mla_kv_lora_rank=shape.mla_kv_lora_rank,
            mla_rope_head_dim=shape.mla_rope_head_dim,
            tied_embeddings=shape.tied_embeddings,
            kv_layers=shape.kv_layers,
            kinds_without_kv=shape.without_kv,
            state_bytes=shape.state_bytes,
        )


def _preset(name: str, n_parameters: int, **config: Any) -> ModelSpec:
    """`config` in the words of the model's own config.json; `n_parameters` as published."""
    return ModelSpec.from_hf_config(config, name=name, n_parameters=n_parameters)


_LLAMA = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8}
_QWEN2 = {"model_type": "qwen2", "vocab_size": 152064}
_QWEN = {"model_type": "qwen", "kv_channels": 128, "vocab_size": 151936}

# Sources: the config.json of meta-llama/Llama-3.1-8B and -70B, Qwen/Qwen2.5-7B and -14B,
# Qwen/Qwen-7B and -14B, google/gemma-7b, HuggingFaceTB/SmolLM2-135M-Instruct and
# deepseek-ai/DeepSeek-V2-Lite on huggingface.co; parameter counts from the headers of their
# safetensors files.
_PRESETS = (
    _preset(
        "Llama-3.1-8B",
        8_030_261_248,
        **_LLAMA,
        num_hidden_layers=32,
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
    ),
    _preset(
        "Llama-3.1-70B",
        70_553_706_496,
        **_LLAMA,
        num_hidden_layers=80,
        hidden_size=8192,
        intermediate_size=28672,
        num_attention_heads=64,
    ),
    _preset(
        "Qwen2.5-7B",
        7_615_616_512,
        **_QWEN2,
        num_hidden_layers=28,
        hidden_size=3584,
        intermediate_size=18944,
        num_attention_heads=28,
        num_key_value_heads=4,
    ),
    _preset(
        "Qwen2.5-14B",
        14_770_033_664,
        **_QWEN2,
        num_hidden_layers=48,
        hidden_size=5120,
        intermediate_size=13824,
        num_attention_heads=40,
        num_key_value_heads=8,
    ),
    _preset(
        "Qwen-7B",
        7_721_324_544,
        **_QWEN,
        num_hidden_layers=32,
        hidden_size=4096,
        intermediate_size=22016,
        num_attention_heads=32,
    ),
    _preset(
        "Qwen-14B",
        14_167_290_880,
        **{**_QWEN, "vocab_size": 152064},
        num_hidden_layers=40,
        hidden_size=5120,
        intermediate_size=27392,
        num_attention_heads=40,
    ),
    _preset(
        "Gemma-7B",
        8_537_680_896,
        model_type="gemma",
        vocab_size=256000,
        num_hidden_layers=28,
        hidden_size=3072,
        intermediate_size=24576,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=256,
    ),
    _preset(
        "SmolLM2-135M",
        134_515_008,
        model_type="llama",
        vocab_size=49152,
        num_hidden_layers=30,
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
    _preset(
        "DeepSeek-V2-Lite",
        15_706_484_224,
        model_type="deepseek_v2",
        vocab_size=102400,
        num_hidden_layers=27,
        hidden_size=2048,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        first_k_dense_replace=1,
        num_attention_heads=16,
        num_key_value_heads=16,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    ),
)

MODELS: dict[str, ModelSpec] = {preset.name: preset for preset in _PRESETS}
"""The presets by name, with 2-byte weights and KV."""


def find_model(name: str) -> ModelSpec:
    """The preset called `name`, in any case. Raises ConfigError naming the known ones."""
    for known, preset in MODELS.items():
        if known.lower() == name.strip().lower():
            return preset
    raise ConfigError(
        f"There is no model preset {name!r}; the known ones are {', '.join(sorted(MODELS))}, "
        "and a config.json describes any other model."
    )
