"""How much KV each layer of a decoder keeps per token: heads, widths, latents, sharing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tiered_kv.core.config_reader import ConfigReader
from tiered_kv.core.model_layers import WINDOW, keeps_kv, read_kinds, window_tokens

_KV_HEADS = ("num_key_value_heads", "multi_query_group_num", "num_attention_groups", "num_kv_heads",
             "n_head_kv")  # fmt: skip
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
HIDDEN = ("hidden_size", "n_embd", "d_model")
HEAD_DIM = ("head_dim", "attention_head_dim", "kv_channels")

_INDEX_SCALE_BLOCK = 128

#: Prompts are cut into chunks of so many tokens on GPUs, unless somebody says otherwise.
CHUNK_TOKENS = 8192
_SHARE_MIN = 1 / 16


def share_apart(window_tokens: int, chunk_tokens: int = CHUNK_TOKENS) -> float:
    """For how many of a prompt's tokens the host has room for the KV of sliding layers, as a share.

    Two windows for each chunk: where a prompt is cut, and where others part from it.
    """
    return min(1.0, max(_SHARE_MIN, 2 * window_tokens / chunk_tokens))


@dataclass(frozen=True, slots=True)
class KVLayers:
    """Layers that attend, and keep as much as each other for a token."""

    n_layers: int
    kv_elements: int
    """Per token and layer; 0 if they read what another layer keeps."""
    kv_heads: int = 1
    """Parts of these that tensor-parallel ranks may share out; 1 for a latent."""
    window_tokens: int = 0
    """How far they look back; 0 if to the beginning."""
    is_sliding: bool = False
    """Whether each token looks back so far, and below the device the last window is enough."""
    other_bytes: int = 0
    """Bytes per token and layer in a format of their own, whatever the KV cache's."""

    def on_group(self, n_ranks: int) -> KVLayers:
        """What `n_ranks` tensor-parallel ranks keep together: each at least one head."""
        heads = -(-self.kv_heads // n_ranks) * n_ranks
        return replace(
            self,
            kv_elements=self.kv_elements // self.kv_heads * heads,
            kv_heads=heads,
            other_bytes=self.other_bytes * n_ranks,
            # Several ranks keep all of it.
            is_sliding=self.is_sliding and n_ranks == 1,
        )


def read_kv_layers(
    reader: ConfigReader, n_layers: int, mla_elements: int
) -> tuple[tuple[KVLayers, ...], tuple[str, ...]]:
    """The layers that attend, in groups, and the kinds of those that don't, one per layer.

    mla_elements: of the latent and the RoPE key if the model has multi-head latent attention, else
    0. Raises ConfigError for what isn't understood.
    """
    kinds = read_kinds(reader, n_layers)
    window = window_tokens(reader)
    # Chunks of attention begin at places of their own.
    is_sliding = not reader.config.get("attention_chunk_size")
    own = _keeps_its_own(reader, n_layers)
    elements = _Elements(reader, n_layers, mla_elements)
    index_bytes = _index_bytes(reader, is_latent=mla_elements > 0)
    layers = []
    for index, kind in enumerate(kinds):
        if keeps_kv(kind):
            heads, per_head = elements.of_layer(index, kind)
            layers.append(
                KVLayers(
                    n_layers=1,
                    kv_elements=heads * per_head if own[index] else 0,
                    kv_heads=max(1, heads),
                    window_tokens=window if kind == WINDOW else 0,
                    is_sliding=is_sliding and kind == WINDOW and window > 0,
                    other_bytes=index_bytes,
                )
            )
    if not any(layer.kv_elements for layer in layers):
        raise reader.error("shares the KV of its layers so that none keeps any; correct it")
    loops = max(1, reader.take("loop_num"))
    if all(layer.is_sliding or not layer.kv_elements for layer in layers):
        # There is nothing that they could be kept apart from.
        layers = [replace(layer, is_sliding=False) for layer in layers]
    groups = tuple(replace(one, n_layers=n * loops) for one, n in Counter(layers).items())
    return groups, tuple(kind for kind in kinds if not keeps_kv(kind))


def kv_heads(config: Mapping[str, Any], reader: ConfigReader, n_heads: int) -> int:
    """KV heads of a layer, the most that one has."""
    if config.get("model_type") == "falcon" and not config.get("new_decoder_architecture"):
        # Its first generation says num_kv_heads too, but doesn't mean it.
        return 1 if config.get("multi_query") else n_heads
    for key in _KV_HEADS:
        if listed := reader.listed(key):
            return max(reader.each(len(listed), key))
    if found := reader.take(*_KV_HEADS):
        return found
    nested = config.get("attn_config")
    if isinstance(nested, Mapping) and nested.get("kv_n_heads"):
        return ConfigReader(nested, reader.name).take("kv_n_heads")
    return 1 if config.get("multi_query") else n_heads


class _Elements:
    """Elements of K and V of one token in each layer."""

    def __init__(self, reader: ConfigReader, n_layers: int, mla_elements: int) -> None:
        self._reader = reader
        self._mla_elements = mla_elements
        if mla_elements:
            return
        config = reader.config
        self._n_heads = max(reader.each(n_layers, "num_query_heads", *HEADS))
        per_layer = ("num_key_value_heads_per_layer", *_KV_HEADS)
        if any(reader.listed(key) for key in per_layer):
            self._kv_heads = reader.each(n_layers, *per_layer)
        else:
            self._kv_heads = [kv_heads(config, reader, self._n_heads)] * n_layers
        self._width = reader.take(*HEAD_DIM) or reader.need(*HIDDEN) // self._n_heads
        self._value_width = reader.take("v_head_dim") or self._width

    def of_layer(self, index: int, kind: str) -> tuple[int, int]:
        """KV heads of layer `index`, and the elements of one per token. A latent is one head."""
        if self._mla_elements:
            return 1, self._mla_elements
        reader, config = self._reader, self._reader.config
        if blocks := reader.listed("block_configs"):
            return self._of_block(blocks[index]["attention"])
        heads, width, value_width = self._kv_heads[index], self._width, self._value_width
        if own := _own_fields(config, index):
            reader = ConfigReader(own, reader.name)
            heads = reader.take("num_key_value_heads") or heads
            own_width = reader.take("head_dim")
            return heads, (own_width or width) + (own_width or value_width)
        if kind == WINDOW:
            other = config.get("attention_other_setting")
            if isinstance(other, Mapping):
                reader = ConfigReader(other, reader.name)
                heads = reader.take("num_attention_groups") or heads
                width = reader.take("head_dim") or width
                return heads, width + (reader.take("v_head_dim") or width)
            heads = reader.take("swa_num_key_value_heads") or heads
            swa_width = reader.take("swa_head_dim")
            width = swa_width or width
            value_width = reader.take("swa_v_head_dim") or swa_width or value_width
        else:
            if config.get("attention_k_eq_v"):
                heads = reader.take("num_global_key_value_heads") or heads
            global_width = reader.take("global_head_dim")
            width, value_width = global_width or width, global_width or value_width
        return heads, width + value_width

    def _of_block(self, attention: Mapping[str, Any]) -> tuple[int, int]:
        reader = ConfigReader(attention, self._reader.name)
        heads = reader.take("num_key_value_heads")
        if not heads:
            heads = self._n_heads // reader.need("n_heads_in_group")
        return heads, self._width + self._value_width


def _own_fields(config: Mapping[str, Any], index: int) -> Mapping[str, Any] | None:
    """What `per_layer_config`, of transformers 5.19 and later, says of a layer: {"05": {...}}."""
    layers = config.get("per_layer_config")
    if not isinstance(layers, Mapping):
        return None
    own = (fields for key, fields in layers.items() if (str(key).lstrip("0") or "0") == str(index))
    return next((fields for fields in own if isinstance(fields, Mapping)), None)


def _keeps_its_own(reader: ConfigReader, n_layers: int) -> list[bool]:
    """Which layers keep KV themselves instead of reading an earlier layer's."""
    shared = reader.take("num_kv_shared_layers")
    factor = reader.need("cla_share_factor") if reader.config.get("use_cla") else 1
    return [index < n_layers - shared and index % factor == 0 for index in range(n_layers)]


def _index_bytes(reader: ConfigReader, *, is_latent: bool) -> int:
    """Bytes per token and layer of the keys by which sparse attention chooses what to read.

    SGLang keeps them in fp8 with a float32 scale for each block of 128, in every layer.
    """
    width = reader.take("index_head_dim")
    if not width:
        return 0
    if not (is_latent and reader.take("index_topk")):
        raise reader.error(
            f"has index_head_dim = {width}, but not the sparse attention of DeepSeek-V3.2; what "
            "its index keeps isn't understood"
        )
    return width + width // _INDEX_SCALE_BLOCK * 4
