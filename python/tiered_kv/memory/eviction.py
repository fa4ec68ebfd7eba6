"""Eviction: an order of leaves by policy, and forecast and keeps as filters before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from tiered_kv.core.ids import Tier
from tiered_kv.core.registry import Registry
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.node import Node
from tiered_kv.memory.demand import DemandForecast
from tiered_kv.memory.forecast_filter import ForecastFilter, soonest
from tiered_kv.memory.keep_filter import KeepFilter
from tiered_kv.memory.keeps import Keeps
from tiered_kv.memory.leaf_walk import EvictionOrder, find_victims

OrderFactory: TypeAlias = Callable[[Forest, Tier], EvictionOrder]

eviction_policies: Registry[OrderFactory] = Registry("eviction policy")
eviction_policies.register("lru", "tiered_kv.memory.lru:LeastRecent")


class Eviction:
    """Chooses what leaves the tiers of one forest.

    The choice depends only on what all tensor-parallel ranks share.
    """

    def __init__(
        self,
        forest: Forest,
        make_order: OrderFactory,
        *,
        protect_expected: bool = True,
        keeps: Keeps | None = None,
    ) -> None:
        """Without `protect_expected` forecasts change nothing. keeps: what is not to go at all."""
        self._forest = forest
        self._protect_expected = protect_expected
        self._filters = {
            tier: ForecastFilter(forest, tier, make_order(forest, tier)) for tier in forest.tiers
        }
        # What decides now: without a forecast nobody pays for the filter.
        self._orders: dict[Tier, EvictionOrder] = {
            tier: found.order for tier, found in self._filters.items()
        }
        self._keep_filters = {
            tier: KeepFilter(forest, tier, Keeps() if keeps is None else keeps, order)
            for tier, order in self._orders.items()
        }

    def on_forecast(self, forecast: DemandForecast) -> None:
        """This replaces the last forecast: what it names is passed over, within bounds."""
        if not self._protect_expected:
            return
        node_ids = soonest(forecast)
        for tier, kept in self._filters.items():
            kept.expect(node_ids)
            self._orders[tier] = kept if kept.is_active else kept.order
            self._keep_filters[tier].order = self._orders[tier]

    def let_go(self, last: Node) -> None:
        """What only the prompt that ends at `last` goes through goes first, in every tier."""
        nodes = self._forest.let_go(last)
        for kept in self._filters.values():
            kept.order.put_back(nodes)

    def victims(self, tier: Tier, n_pages: int) -> list[Node]:
        """Nodes to evict from `tier`, which together have at least `n_pages` if possible.

        Evicting them in this order must be legal: each is one of `forest.leaves(tier)` or becomes
        one once those before it are gone. The last one is needed: without it there would be less
        than `n_pages`. Nothing in the forest is changed.
        """
        kept = self._keep_filters[tier]
        order = kept if kept.is_active else self._orders[tier]
        return find_victims(self._forest, tier, order, n_pages)
