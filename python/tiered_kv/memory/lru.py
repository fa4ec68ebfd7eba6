"""Least recently used first, from the leaves up."""

from __future__ import annotations

import heapq

from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.node import Node
from tiered_kv.forest.residency import Residency


class LruEviction:
    """Evicts the leaf whose last use, in logical ticks, is longest ago; the older node on a tie.

    One lazy heap per tier, brought up to date only when victims are wanted: a call costs
    O((new leaves + victims + entries gone stale) * log(leaves)), not O(leaves).
    """

    def __init__(self, forest: Forest) -> None:
        self._forest = forest
        self._heaps = {tier: _LeafHeap(forest, tier) for tier in forest.tiers}

    def victims(self, tier: Tier, n_pages: int) -> list[Node]:
        """See `EvictionPolicy.victims`."""
        heap = self._heaps[tier]
        heap.refresh()
        # What the forest would look like with the victims gone: children left per node, and the
        # nodes that thereby became leaves.
        children_left: dict[Node, int] = {}
        uncovered: set[Node] = set()
        victims: dict[Node, None] = {}
        found = 0
        while found < n_pages:
            node = heap.pop(uncovered, victims)
            if node is None:
                break
            victims[node] = None
            found += node.n_pages
            parent = node.parent
            if parent is None or parent.is_root:
                continue
            record = parent.records[tier]
            left = children_left.get(parent, record.children_present) - 1
            children_left[parent] = left
            if left == 0 and record.state is Residency.RESIDENT and record.pins == 0:
                uncovered.add(parent)
                heap.push(parent)
        # The caller may not carry it out, so what was popped goes back; if it does, the entries
        # are stale and fall out at the next call.
        for node in victims:
            heap.push(node)
        return list(victims)


class _LeafHeap:
    """The leaves of one tier by last access; may hold stale and double entries."""

    # Node ids rather than nodes: entries must not keep forgotten nodes in memory.
    _SLACK = 64

    def __init__(self, forest: Forest, tier: Tier) -> None:
        self._forest = forest
        self._tier = tier
        self._entries: list[tuple[int, int]] = []
        self._seen = 0

    def refresh(self) -> None:
        """Add the leaves that are new since the last call."""
        forest, tier = self._forest, self._tier
        for node in forest.leaves_after(tier, self._seen):
            self.push(node)
        self._seen = forest.leaf_sequence(tier)
        leaves = forest.leaves(tier)
        if len(self._entries) > 2 * len(leaves) + self._SLACK:
            self._entries = [(node.last_access, node.node_id) for node in leaves]
            heapq.heapify(self._entries)

    def push(self, node: Node) -> None:
        heapq.heappush(self._entries, (node.last_access, node.node_id))

    def pop(self, uncovered: set[Node], taken: dict[Node, None]) -> Node | None:
        """The least recently used leaf, or node in `uncovered`, that is not in `taken`."""
        leaves = self._forest.leaves(self._tier)
        while self._entries:
            last_access, node_id = heapq.heappop(self._entries)
            node = self._forest.find(node_id)
            if node is None or node in taken or (node not in leaves and node not in uncovered):
                continue
            if node.last_access == last_access:
                return node
            # Used since it was pushed: its place is farther back.
            self.push(node)
        return None
