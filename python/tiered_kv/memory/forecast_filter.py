"""The forecast as a filter: what is expected soon is not taken, whatever the order of eviction.

A wish, not a pin: it covers a bounded share of the tier, and when nothing else is left, what was
expected goes as well, what is needed latest first.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.node import Node
from tiered_kv.forest.residency import Residency
from tiered_kv.memory.demand import DemandForecast
from tiered_kv.memory.leaf_walk import EvictionOrder, MayGo

#: What is expected later than this,
PROTECT_WITHIN_S = 60.0
#: or is less probable, is cache like any other.
PROTECT_PROBABILITY = 0.5
#: Largest share of what is resident in a tier that is kept for what is expected.
PROTECT_SHARE = 0.5


def soonest(forecast: DemandForecast) -> list[int]:
    """Ids of the nodes that `forecast` is to protect, those needed first at the front."""
    expected = [
        (expectation.starts_in_s, node_id)
        for node_id, expectation in forecast.next_use.items()
        if expectation.starts_in_s <= PROTECT_WITHIN_S
        and expectation.probability >= PROTECT_PROBABILITY
    ]
    return [node_id for _, node_id in sorted(expected)]


class ForecastFilter:
    """An order of eviction for one tier that passes over what is expected.

    Which nodes that are is settled when victims are first wanted after a forecast: the expected
    ones with all above them, as far as they are in the tier, soonest first while they fit in the
    share.
    """

    def __init__(self, forest: Forest, tier: Tier, order: EvictionOrder) -> None:
        self.order = order
        self._forest = forest
        self._tier = tier
        self._expected: Sequence[int] = ()
        self._is_settled = True
        self._kept: dict[int, int] = {}
        """Places in the order of need by node id; a node's is behind those above it."""
        self._passed_over: dict[int, None] = {}
        """Those of them that `order` gave up. They stay out of it, so that it names each once."""

    @property
    def is_active(self) -> bool:
        """Whether anything is, or was lately, expected; if not, `order` alone decides the same."""
        return bool(self._expected or self._kept)

    def expect(self, node_ids: Sequence[int]) -> None:
        """These are expected, the first one soonest, and nothing else any more."""
        self._expected = node_ids
        self._is_settled = False

    def refresh(self) -> None:
        """See `EvictionOrder.refresh`."""
        if not self._is_settled:
            self._settle()
        self.order.refresh()

    def add(self, node: Node) -> None:
        """See `EvictionOrder.add`."""
        self.order.add(node)

    def pop(self, may_go: MayGo) -> Node | None:
        """See `EvictionOrder.pop`."""
        while (node := self.order.pop(may_go)) is not None:
            if node.node_id not in self._kept:
                return node
            self._passed_over[node.node_id] = None
        return self._pop_latest(may_go)

    def put_back(self, victims: Iterable[Node]) -> None:
        """See `EvictionOrder.put_back`."""
        others = []
        for node in victims:
            if node.node_id in self._kept:
                self._passed_over[node.node_id] = None
            else:
                others.append(node)
        self.order.put_back(others)

    def _pop_latest(self, may_go: MayGo) -> Node | None:
        """Nothing else is left: the one of those passed over that is needed latest."""
        for node_id in sorted(self._passed_over, key=self._kept.__getitem__, reverse=True):
            del self._passed_over[node_id]
            node = self._forest.find(node_id)
            if node is not None and may_go(node):
                return node
        return None

    def _settle(self) -> None:
        """O(expected nodes, and those above them that are kept)."""
        self._is_settled = True
        forest, tier = self._forest, self._tier
        room = int(PROTECT_SHARE * forest.resident_tokens(tier) / forest.page_size)
        kept: dict[int, int] = {}
        for node_id in self._expected:
            if room <= 0:
                break
            node, path, n_pages = forest.find(node_id), [], 0
            while node is not None and not node.is_root and node.node_id not in kept:
                if node.records[tier].state is not Residency.ABSENT:
                    path.append(node.node_id)
                    n_pages += node.n_pages
                    if n_pages > room:
                        break
                node = node.parent
            else:
                if node is not None:
                    room -= n_pages
                    kept.update(zip(reversed(path), itertools.count(len(kept)), strict=False))
        self._kept = kept
        released = [i for i in self._passed_over if i not in kept]
        for node_id in released:
            del self._passed_over[node_id]
        nodes = (forest.find(node_id) for node_id in released)
        self.order.put_back([node for node in nodes if node is not None])
