"""What placement has to know about costs; the scheduler's cost model provides it."""

from __future__ import annotations

from typing import Protocol

from tiered_kv.core.ids import Tier


class Costs(Protocol):
    """Seconds; the same on all tensor-parallel ranks. Tokens are the forest's."""

    def bytes_per_token(self, tier: Tier) -> float:
        """KV bytes of one token in all layers, as `tier` keeps them.

        Tiers may keep them in different formats. What moves between two has the farther one's.
        """
        ...

    def recompute_s(self, start: int, end: int) -> float:
        """To compute tokens [start, end) of a prompt whose first `start` tokens are there."""
        ...

    def load_s(self, source: Tier, target: Tier, n_bytes: int, queued_bytes: int = 0) -> float:
        """Until `n_bytes` from `source` are in `target`, behind what is queued."""
        ...


class EqualCosts:
    """For want of a model: every token costs the same to compute, a hundredth of it to load."""

    _LOAD_SHARE = 0.01

    def bytes_per_token(self, tier: Tier) -> float:
        del tier
        return 1.0

    def recompute_s(self, start: int, end: int) -> float:
        return float(end - start)

    def load_s(self, source: Tier, target: Tier, n_bytes: int, queued_bytes: int = 0) -> float:
        return (n_bytes + queued_bytes) * self._LOAD_SHARE * (target.value != source.value)
