"""Segmented LRU: what was used once goes before what was used again.

Karedla, Love and Wherry, "Caching strategies to improve disk system performance", 1994.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.node import Node
from tiered_kv.memory.leaf_walk import MayGo, NewLeaves
from tiered_kv.memory.uses import UseCounter

#: The protected segment's largest share of the tier.
PROTECTED_SHARE = 0.8


class Segments:
    """The least recently used leaf on probation, then the least recently used protected one.

    A leaf is on probation until it is used again, or turns out to have been extended. Two lazy
    heaps by last access; an entry counts if `_protected` agrees with its segment.
    """

    def __init__(self, forest: Forest, tier: Tier) -> None:
        self._forest = forest
        self._tier = tier
        self._new = NewLeaves(forest, tier)
        self._uses = UseCounter(forest)
        self._on_probation: list[tuple[int, int]] = []
        self._protected_heap: list[tuple[int, int]] = []
        self._protected: dict[int, int] = {}
        """Pages of protected leaves, by node id."""
        self._protected_pages = 0

    def refresh(self) -> None:
        for node in self._new.take():
            self._uses.look(node)
            self._enter(node, is_protected=self._uses.uses(node) > 0)
        limit = PROTECTED_SHARE * self._forest.resident_tokens(self._tier) / self._forest.page_size
        while self._protected_pages > limit:
            self._demote()

    def add(self, node: Node) -> None:
        # It has had children, so it was used after it was made.
        self._uses.look(node)
        self._uses.set(node, max(1, self._uses.uses(node)))
        self._enter(node, is_protected=True)

    def put_back(self, victims: Iterable[Node]) -> None:
        for node in victims:
            self._enter(node, is_protected=self._uses.uses(node) > 0)

    def pop(self, may_go: MayGo) -> Node | None:
        for heap, is_protected in ((self._on_probation, False), (self._protected_heap, True)):
            node = self._pop(heap, is_protected, may_go)
            if node is not None:
                return node
        return None

    def _pop(self, heap: list[tuple[int, int]], is_protected: bool, may_go: MayGo) -> Node | None:
        while heap:
            last_access, node_id = heapq.heappop(heap)
            if (node_id in self._protected) is not is_protected:
                continue
            node = self._forest.find(node_id)
            if node is None or not may_go(node):
                self._leave(node_id)
                continue
            if node.last_access == last_access:
                self._leave(node_id)
                return node
            self._uses.look(node)
            self._enter(node, is_protected=True)
        return None

    def _enter(self, node: Node, *, is_protected: bool) -> None:
        self._leave(node.node_id)
        entry = (node.last_access, node.node_id)
        if is_protected:
            self._protected[node.node_id] = node.n_pages
            self._protected_pages += node.n_pages
            heapq.heappush(self._protected_heap, entry)
        else:
            heapq.heappush(self._on_probation, entry)

    def _leave(self, node_id: int) -> None:
        self._protected_pages -= self._protected.pop(node_id, 0)

    def _demote(self) -> None:
        """The least recently used protected leaf goes on probation."""
        node = self._pop(self._protected_heap, True, lambda _: True)
        if node is None:
            # Nothing that is known is protected: the rest of the count is of forgotten nodes.
            self._protected.clear()
            self._protected_pages = 0
            return
        self._uses.set(node, 0)
        self._enter(node, is_protected=False)
