"""The eviction policy's interface, and the policies by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias, runtime_checkable

from tiered_kv.core.ids import Tier
from tiered_kv.core.registry import Registry
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.node import Node
from tiered_kv.memory.costs import Costs
from tiered_kv.memory.demand import DemandForecast


class EvictionPolicy(Protocol):
    """Chooses what leaves a tier. Made for one forest; asked about each of its tiers."""

    def victims(self, tier: Tier, n_pages: int) -> list[Node]:
        """Nodes to evict from `tier`, which together have at least `n_pages` if possible.

        Evicting them in this order must be legal: each is one of `forest.leaves(tier)` or becomes
        one once those before it are gone. The last one is needed: without it there would be less
        than `n_pages`. Nothing in the forest is changed. The choice may depend only on what all
        tensor-parallel ranks share.
        """
        ...


@runtime_checkable
class InformedPolicy(Protocol):
    """What an eviction policy may offer besides: it uses costs and forecasts."""

    def inform(self, costs: Costs) -> None:
        """Use these costs from now on."""
        ...

    def on_forecast(self, forecast: DemandForecast) -> None:
        """This replaces the last forecast."""
        ...


PolicyFactory: TypeAlias = Callable[[Forest], EvictionPolicy]

eviction_policies: Registry[PolicyFactory] = Registry("eviction policy")
eviction_policies.register("lru", "tiered_kv.memory.lru:LruEviction")
eviction_policies.register("slru", "tiered_kv.memory.slru:SlruEviction")
eviction_policies.register("s3fifo", "tiered_kv.memory.s3fifo:S3FifoEviction")
eviction_policies.register("value", "tiered_kv.memory.value:ValueEviction")
