"""Least recently used first, from the leaves up."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.node import Node
from tiered_kv.memory.leaf_walk import MayGo, NewLeaves


class LeastRecent:
    """The leaf whose last use, in logical ticks, is longest ago; the older node on a tie.

    A lazy heap with stale and double entries, brought up to date only when victims are wanted: a
    call costs O((new leaves + victims + entries gone stale) * log(leaves)), not O(leaves).
    """

    _SLACK = 64

    def __init__(self, forest: Forest, tier: Tier) -> None:
        self._forest = forest
        self._tier = tier
        self._entries: list[tuple[int, int]] = []
        self._new = NewLeaves(forest, tier)

    def refresh(self) -> None:
        for node in self._new.take():
            self.add(node)
        leaves = self._forest.leaves(self._tier)
        if len(self._entries) > 2 * len(leaves) + self._SLACK:
            self._entries = [(node.last_access, node.node_id) for node in leaves]
            heapq.heapify(self._entries)

    def add(self, node: Node) -> None:
        heapq.heappush(self._entries, (node.last_access, node.node_id))

    def put_back(self, victims: Iterable[Node]) -> None:
        for node in victims:
            self.add(node)

    def pop(self, may_go: MayGo) -> Node | None:
        while self._entries:
            last_access, node_id = heapq.heappop(self._entries)
            node = self._forest.find(node_id)
            if node is None or not may_go(node):
                continue
            if node.last_access == last_access:
                return node
            # Used since it was pushed: its place is farther back.
            self.add(node)
        return None
