"""Keeps as a filter: what is kept is not taken, whatever the order of eviction.

A wish, not a pin: when nothing else is left, what is kept goes as well, what ends first at first.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable

from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.node import Node
from tiered_kv.memory.keeps import Keeps
from tiered_kv.memory.leaf_walk import EvictionOrder, MayGo


class KeepFilter:
    """An order of eviction for one tier that passes over what is kept there.

    order: what decides among all else; it may be changed for another over the same leaves. A node
    is kept if its last page is: whoever keeps a prefix cuts the node in which it ends.
    """

    def __init__(self, forest: Forest, tier: Tier, keeps: Keeps, order: EvictionOrder) -> None:
        self.order = order
        self._forest = forest
        self._tier = tier
        self._keeps = keeps
        self._passed_over: dict[int, float] = {}
        """When the keeps of those end that `order` gave up, by node id."""
        # The same in that order, with entries gone stale.
        self._by_end: list[tuple[float, int, int]] = []
        self._numbers = itertools.count()
        self._n_released = 0

    @property
    def is_active(self) -> bool:
        """Whether anything is, or was lately, kept; if not, `order` alone decides the same."""
        return bool(self._passed_over) or self._keeps.n_pages(self._tier) > 0

    def refresh(self) -> None:
        """See `EvictionOrder.refresh`."""
        n_released = self._keeps.n_released(self._tier)
        if n_released != self._n_released:
            self._n_released = n_released
            self._let_go()
        self.order.refresh()

    def add(self, node: Node) -> None:
        """See `EvictionOrder.add`."""
        self.order.add(node)

    def pop(self, may_go: MayGo) -> Node | None:
        """See `EvictionOrder.pop`."""
        while (node := self.order.pop(may_go)) is not None:
            if not self._pass_over(node):
                return node
        return self._pop_first_to_end(may_go)

    def put_back(self, victims: Iterable[Node]) -> None:
        """See `EvictionOrder.put_back`."""
        self.order.put_back([node for node in victims if not self._pass_over(node)])

    def _pass_over(self, node: Node) -> bool:
        until_s = self._keeps.until_s(self._tier, node.last_page_hash)
        if until_s is None:
            return False
        self._passed_over[node.node_id] = until_s
        heapq.heappush(self._by_end, (until_s, next(self._numbers), node.node_id))
        return True

    def _pop_first_to_end(self, may_go: MayGo) -> Node | None:
        """Nothing else is left. Whoever may not go now comes back as a leaf of its own."""
        while self._by_end:
            until_s, _, node_id = heapq.heappop(self._by_end)
            if self._passed_over.get(node_id) != until_s:
                continue
            del self._passed_over[node_id]
            node = self._forest.find(node_id)
            if node is None or not may_go(node):
                continue
            now_until_s = self._keeps.until_s(self._tier, node.last_page_hash)
            if now_until_s is not None and now_until_s != until_s:
                self._pass_over(node)  # kept for longer, or for less long, meanwhile
                continue
            return node
        return None

    def _let_go(self) -> None:
        """Those that are kept no longer are for `order` again."""
        free: list[Node] = []
        for node_id in list(self._passed_over):
            node = self._forest.find(node_id)
            if node is not None and self._keeps.until_s(self._tier, node.last_page_hash) is None:
                free.append(node)
            elif node is not None:
                continue
            del self._passed_over[node_id]
        self.order.put_back(free)
