"""Evict what is needed farthest in the future, for whoever can say when that is."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from functools import partial
from typing import Protocol

from tiered_kv.core.config import MemoryConfig
from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.node import Node
from tiered_kv.memory.actions import Drop
from tiered_kv.memory.costs import Costs
from tiered_kv.memory.leaf_walk import MayGo, NewLeaves
from tiered_kv.memory.manager import MemoryManager
from tiered_kv.simulation.live import LiveRequest


class Listener(Protocol):
    """Is told what becomes of requests."""

    def on_arrival(self, live: LiveRequest, now_s: float) -> None:
        """`live` waits, for the first time."""
        ...

    def on_admission(self, live: LiveRequest) -> None:
        """`live` has made the use of its prefix that was ahead."""
        ...

    def on_finish(self, live: LiveRequest, forest: Forest, now_s: float) -> None:
        """`live`, whose prefix is still pinned, is done."""
        ...


class Foresight(Listener, Protocol):
    """Knows, or expects, when a node's pages are asked for again."""

    touched: list[int]
    """Ids of nodes whose next use has changed, in the order in which it did; it only grows."""

    def next_use_s(self, node: Node) -> float:
        """Time of the next use of the node's last page; infinity if none is known."""
        ...

    def on_split(self, upper: Node, lower: Node) -> None:
        """`upper` was cut off `lower`, which is about to go."""
        ...


class ForesightManager(MemoryManager):
    """The server's memory manager, but for the order in which leaves go."""

    def __init__(
        self, forest: Forest, config: MemoryConfig, foresight: Foresight, costs: Costs
    ) -> None:
        order = partial(FarthestFirst, foresight=foresight)
        super().__init__(forest, config, costs, make_order=order)
        self._foresight = foresight

    def on_pressure(self, tier: Tier, n_pages: int) -> list[Drop]:
        """See `MemoryManager.on_pressure`."""
        drops = super().on_pressure(tier, n_pages)
        if drops:
            last = self._forest.node(drops[-1].node_id)
            if last.parent is not None and not last.parent.is_root:
                self._foresight.on_split(last.parent, last)
        return drops


class FarthestFirst:
    """The leaf whose next use is farthest; among equals the least recently used one.

    The leaves of one tier by next use; may hold stale and double entries.
    """

    _SLACK = 64

    def __init__(self, forest: Forest, tier: Tier, foresight: Foresight) -> None:
        self._forest = forest
        self._tier = tier
        self._foresight = foresight
        self._entries: list[tuple[float, int, int]] = []
        self._new = NewLeaves(forest, tier)
        self._n_touched = 0

    def refresh(self) -> None:
        for node in self._new.take():
            self.add(node)
        leaves = self._forest.leaves(self._tier)
        # On the host a node stays a leaf while the device's copy is in use.
        touched = self._foresight.touched
        for node_id in touched[self._n_touched :]:
            found = self._forest.find(node_id)
            if found is not None and found in leaves:
                self.add(found)
        self._n_touched = len(touched)
        if len(self._entries) > 2 * len(leaves) + self._SLACK:
            self._entries = [self._entry(node) for node in leaves]
            heapq.heapify(self._entries)

    def add(self, node: Node) -> None:
        heapq.heappush(self._entries, self._entry(node))

    def put_back(self, victims: Iterable[Node]) -> None:
        for node in victims:
            self.add(node)

    def pop(self, may_go: MayGo) -> Node | None:
        while self._entries:
            entry = heapq.heappop(self._entries)
            node = self._forest.find(entry[2])
            if node is None or not may_go(node):
                continue
            if self._entry(node) <= entry:
                return node
            self.add(node)
        return None

    def _entry(self, node: Node) -> tuple[float, int, int]:
        return -self._foresight.next_use_s(node), node.last_access, node.node_id
