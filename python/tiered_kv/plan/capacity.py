"""How many tokens and requests fit in each tier."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from tiered_kv.core.errors import ConfigError
from tiered_kv.core.ids import Tier
from tiered_kv.core.model_spec import ModelSpec

_NOMINAL = re.compile(r"(\d+(?:\.\d+)?)([bm])(?![a-z0-9])", re.IGNORECASE)


def nominal_parameters(name: str) -> int:
    """The parameters that a model's name claims: 8e9 for "Llama-3.1-8B".

    Raises ConfigError for a name without such a number.
    """
    found = _NOMINAL.search(name)
    if found is None:
        raise ConfigError(
            f"The name {name!r} states no number of parameters such as 7B; plan with the counted "
            "ones instead."
        )
    return round(float(found[1]) * (1e9 if found[2].lower() == "b" else 1e6))


@dataclass(frozen=True, slots=True)
class TierCapacity:
    """What one tier holds."""

    tier: Tier
    kv_bytes: int
    """Bytes that KV can take there."""
    tokens: int
    """Tokens whose KV fits, all layers."""
    requests: int
    """Whole contexts of the length asked about that fit."""


@dataclass(frozen=True, slots=True)
class ContextMemory:
    """KV of one context, and how many such fit beside the weights: a row of the classic table."""

    model: str
    context_tokens: int
    kv_bytes_per_layer: float
    """Bytes of K and V (or of the latent) of the whole context in one layer."""
    kv_bytes: float
    """Bytes in all layers."""
    weight_bytes: float
    """Bytes of the weights."""
    concurrency: int
    """Whole contexts that fit in what the weights leave."""


def context_memory(
    model: ModelSpec,
    context_tokens: int,
    memory_bytes: float,
    *,
    weight_bytes: float | None = None,
    n_devices: int = 1,
) -> ContextMemory:
    """The row for `model`; `weight_bytes` overrides those of the parameters counted.

    memory_bytes: of `n_devices`, a tensor-parallel group, together. Raises ConfigError for a
    context without tokens.
    """
    _require_context(context_tokens)
    weights = model.weight_bytes if weight_bytes is None else weight_bytes
    kv_bytes = context_tokens * model.kv_bytes_per_token
    kept_bytes = context_tokens * model.on_group(n_devices).kv_bytes_per_token
    return ContextMemory(
        model=model.name,
        context_tokens=context_tokens,
        kv_bytes_per_layer=context_tokens * model.kv_bytes_per_token_layer,
        kv_bytes=kv_bytes,
        weight_bytes=weights,
        concurrency=max(0, int((memory_bytes - weights) // kept_bytes)),
    )


def tier_capacities(
    model: ModelSpec,
    device_kv_bytes: float,
    farther_bytes: Mapping[Tier, int],
    context_tokens: int,
    *,
    stored: ModelSpec | None = None,
) -> list[TierCapacity]:
    """What each tier holds, nearest first.

    `stored`: the model with the KV that the farther tiers keep of a token, if that is less: what
    several ranks have on their devices is kept there once. `device_kv_bytes`: what the device has
    left for KV. `farther_bytes`: sizes of the tiers behind it; every tier holds copies, so
    capacities don't add up. Raises ConfigError if nothing fits on the device.
    """
    _require_context(context_tokens)
    if device_kv_bytes < model.kv_bytes_per_token:
        raise ConfigError(
            f"The weights of {model.name} ({model.weight_bytes / 1e9:.1f} GB) leave no room for KV "
            "on the device; take more or larger devices, or say what they take (--weight-bytes)."
        )
    sizes = {Tier.DEVICE: int(device_kv_bytes), **farther_bytes}
    capacities = []
    for tier in sorted(sizes):
        per_token = model.kv_bytes_per_token
        if tier is not Tier.DEVICE:
            per_token = (stored or model).stored_kv_bytes_per_token
        tokens = int(sizes[tier] // per_token)
        capacities.append(TierCapacity(tier, sizes[tier], tokens, tokens // context_tokens))
    return capacities


def _require_context(context_tokens: int) -> None:
    if context_tokens < 1:
        raise ConfigError(f"A context needs at least 1 token, not {context_tokens}.")
