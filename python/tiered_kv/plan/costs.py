"""What a hit in each tier saves, and what long context costs, by the cost model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tiered_kv.core.ids import Tier
from tiered_kv.scheduler.cost_model import CostModel


@dataclass(frozen=True, slots=True)
class HitCost:
    """A hit of `prefix_tokens` in `tier`, against computing them."""

    tier: Tier
    prefix_tokens: int
    load_s: float
    """Seconds to bring the prefix to the device; 0 from the device."""
    hit_s: float
    """Seconds to the first token with the hit: load, then prefill of the rest of the prompt."""
    recompute_s: float
    """Seconds to the first token without it."""
    break_even_tokens: int | None
    """Shortest prefix from which on a hit is sooner; None if none is up to the longest asked."""


def hit_cost(
    cost: CostModel, tier: Tier, prefix_tokens: int, new_tokens: int, longest_tokens: int
) -> HitCost:
    """The cost of a hit in `tier` for a prompt of `prefix_tokens` + `new_tokens`.

    Break-even is sought among prefixes up to `longest_tokens`. Nothing overlaps: the load of later
    layers behind the computation of earlier ones makes hits cheaper than this.
    """
    load_s = _load_s(cost, tier, prefix_tokens)
    return HitCost(
        tier=tier,
        prefix_tokens=prefix_tokens,
        load_s=load_s,
        hit_s=load_s + cost.prefill_s(new_tokens, prefix_tokens),
        recompute_s=cost.prefill_s(prefix_tokens + new_tokens),
        break_even_tokens=break_even_tokens(cost, tier, new_tokens, longest_tokens),
    )


def break_even_tokens(
    cost: CostModel, tier: Tier, new_tokens: int, longest_tokens: int
) -> int | None:
    """The shortest prefix such that a hit is sooner for it and all longer ones looked at.

    Prefill grows faster than loading, so what pays goes on paying; only short prefixes, which cost
    a transfer's latency or fit in a forward pass that takes place anyway, may not.
    """
    if not _pays(cost, tier, longest_tokens, new_tokens):
        return None
    # Halve the length until it doesn't pay, then close in.
    pays = longest_tokens
    fails = pays // 2
    while fails and _pays(cost, tier, fails, new_tokens):
        pays, fails = fails, fails // 2
    while pays - fails > 1:
        middle = (pays + fails) // 2
        if _pays(cost, tier, middle, new_tokens):
            pays = middle
        else:
            fails = middle
    return pays


def _pays(cost: CostModel, tier: Tier, prefix_tokens: int, new_tokens: int) -> bool:
    with_hit_s = _load_s(cost, tier, prefix_tokens) + cost.prefill_s(new_tokens, prefix_tokens)
    return with_hit_s < cost.prefill_s(prefix_tokens + new_tokens)


def _load_s(cost: CostModel, tier: Tier, tokens: int) -> float:
    n_bytes = int(cost.model.loaded_kv_bytes(tokens))
    return cost.load_s(tier, Tier.DEVICE, n_bytes)


@dataclass(frozen=True, slots=True)
class LongContextCost:
    """The four costs of one context length (Fu, arXiv 2405.08944): each grows with it."""

    context_tokens: int
    prefill_s: float
    """Seconds to compute it."""
    kv_bytes: float
    """Bytes of its KV."""
    concurrency: int
    """How many such fit on the device."""
    decode_s: float
    """Seconds per output token of one request alone."""
    load_s: dict[Tier, float]
    """Seconds to bring its KV to the device, by tier."""


def long_context_costs(
    cost: CostModel,
    device_kv_bytes: float,
    tiers: Sequence[Tier],
    lengths: Sequence[int],
) -> list[LongContextCost]:
    """The four costs for each of `lengths` (tokens), with loads from each of `tiers`."""
    return [
        LongContextCost(
            context_tokens=length,
            prefill_s=cost.prefill_s(length),
            kv_bytes=length * cost.model.kv_bytes_per_token,
            concurrency=int(device_kv_bytes // (length * cost.model.kv_bytes_per_token)),
            decode_s=cost.iteration_s([], length, 1),
            load_s={tier: _load_s(cost, tier, length) for tier in tiers},
        )
        for length in lengths
    ]


@dataclass(frozen=True, slots=True)
class DecodeSplit:
    """Where one decode iteration of `batch` requests goes, in seconds."""

    context_tokens: int
    batch: int
    linear_s: float
    """Projections and MLP: reading the weights, whatever the context."""
    attention_s: float
    """What the contexts add: reading their KV."""
    fixed_s: float
    """Launches and the engine's step."""


def decode_split(cost: CostModel, batch: int, lengths: Sequence[int]) -> list[DecodeSplit]:
    """The split at each context length. Attention is what the contexts add to an iteration."""
    fixed_s = cost.decode_correction.fixed_s
    linear_s = cost.iteration_s([], 0, batch) - fixed_s
    return [
        DecodeSplit(
            context_tokens=length,
            batch=batch,
            linear_s=linear_s,
            attention_s=cost.iteration_s([], batch * length, batch) - linear_s - fixed_s,
            fixed_s=fixed_s,
        )
        for length in lengths
    ]


def doubling(first: int, last: int) -> list[int]:
    """`first`, twice that, and so on below `last`; then `last`."""
    lengths = []
    length = first
    while length < last:
        lengths.append(length)
        length *= 2
    return [*lengths, last]
