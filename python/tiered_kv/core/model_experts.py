"""The experts of a mixture, and which layers have them, in the dialects of config.json."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from tiered_kv.core.config_reader import ConfigReader, shown

_EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")
_ACTIVE = (
    "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_k",
    "top_k_experts", "moe_top_k", "num_experts_per_topk",
)  # fmt: skip
_SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert")
_SHARED_WIDTH = (
    "shared_expert_intermediate_size", "shared_intermediate_size", "share_expert_dim",
    "moe_shared_expert_intermediate_size",
)  # fmt: skip
_WIDTH = (
    "moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size", "ffn_hidden_size",
)  # fmt: skip
_READ = frozenset(
    {
        "mlp_layer_types", "moe_layer_freq", "moe_layers", "moe_layers_enum", "mlp_only_layers",
        "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index",
        "moe_layer_end_index", "interleave_moe_layer_step", "decoder_sparse_step",
        "moe_layer_interval", "expert_layer_period", "expert_layer_offset",
    }
)  # fmt: skip
_PLACES = re.compile(r"moe_\w*(freq|interval|step|period|every)|(expert|sparse)_\w*(step|period)")


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts."""

    n_experts: int
    n_active: int
    """Experts that one token uses, without the shared ones."""
    size: int
    """Width of one."""
    shared_size: int
    """Width of those that every token uses, together."""
    n_layers: int
    """Layers that have them; the others have a dense MLP."""


def read_experts(reader: ConfigReader, n_layers: int) -> Experts | None:
    """The mixture of experts that the config describes; None for a dense model.

    Raises ConfigError if it isn't understood which layers have experts.
    """
    if False in (reader.config.get("is_moe"), reader.config.get("enable_moe_block")):
        return None
    nested = reader.config.get("ffn_config")
    if isinstance(nested, Mapping):
        # DBRX keeps them in a block of their own.
        reader = ConfigReader({**reader.config, **nested}, reader.name)
    n_experts = reader.take(*_EXPERTS)
    if n_experts < 2:
        return None
    size = reader.need(*_WIDTH)
    shared = reader.take(*_SHARED_WIDTH)
    if reader.config.get("intermediate_size_mlp"):
        # Llama 4 has one shared expert, as wide as the others, without a word.
        shared = shared or size
    n_active = reader.need(*_ACTIVE)
    if n_empty := reader.take("zero_expert_num"):
        # Some of those that a token chooses compute nothing.
        n_active = max(1, round(n_active * n_experts / (n_experts + n_empty)))
    return Experts(
        n_experts,
        n_active,
        size,
        shared or reader.take(*_SHARED) * size,
        len(_moe_layers(reader, n_layers)),
    )


def _moe_layers(reader: ConfigReader, n_layers: int) -> list[int]:
    """The layers that have experts, from 0."""
    config = reader.config
    for key, value in config.items():
        if key not in _READ and value not in (None, 0, 1, False) and _PLACES.search(key):
            raise reader.error(
                f"has {key} = {shown(value)}, which isn't understood: which layers have experts?"
            )
    for key in ("mlp_layer_types", "moe_layer_freq"):
        if flags := reader.listed(key):
            reader.require_length(key, flags, n_layers)
            return [index for index in range(n_layers) if flags[index] not in (0, "dense")]
    for key in ("moe_layers", "moe_layers_enum"):
        chosen = reader.listed(key)
        if isinstance(text := config.get(key), str):
            chosen = [int(part) for part in text.split(",") if part.strip().isdecimal()]
        if chosen is not None:
            return [index for index in range(n_layers) if index in chosen]
    return _moe_layers_by_rule(reader, n_layers)


def _moe_layers_by_rule(reader: ConfigReader, n_layers: int) -> list[int]:
    dense = reader.listed("mlp_only_layers") or ()
    first = max(map(reader.take, ("first_k_dense_replace", "num_dense_layers",
                                  "moe_layer_start_index")))  # fmt: skip
    last = reader.config.get("moe_layer_end_index")
    last = n_layers - 1 if last in (None, -1) else reader.take("moe_layer_end_index")
    every = max(1, *map(reader.take, ("interleave_moe_layer_step", "decoder_sparse_step",
                                      "moe_layer_interval")))  # fmt: skip
    period = max(1, reader.take("expert_layer_period"))
    offset = reader.take("expert_layer_offset") % period
    freq = max(1, reader.take("moe_layer_freq"))
    return [
        index
        for index in range(first, last + 1)
        if index not in dense
        and (index + 1) % every == 0
        and index % period == offset
        and index % freq == 0
    ]
