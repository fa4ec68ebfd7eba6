"""What waits to be written when not everything can be at once: the most valuable goes first."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

from tiered_kv.forest.node import Node

#: More than these are not kept for later.
MAX_DEFERRED = 16384


class DeferredNodes:
    """At most `capacity()` nodes by value; of equals, the one that has waited longest.

    When it is full, what is worth least is left out. Values are taken when a node comes in.
    """

    def __init__(self, value: Callable[[Node], float], capacity: Callable[[], int]) -> None:
        self._value = value
        self._capacity = capacity
        self._keys: dict[Node, tuple[float, int]] = {}
        # Lazy: an entry counts if its key is still the node's. The keys of `_worst` are negated.
        self._best: list[tuple[float, int, Node]] = []
        self._worst: list[tuple[float, int, Node]] = []
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, node: Node) -> bool:
        return node in self._keys

    def add(self, node: Node) -> None:
        """Has no effect on a node that waits already."""
        if node in self._keys:
            return
        # The greater the value, the smaller the key; older nodes have smaller numbers.
        key = (-self._value(node), next(self._numbers))
        self._keys[node] = key
        heapq.heappush(self._best, (*key, node))
        heapq.heappush(self._worst, (-key[0], -key[1], node))
        while len(self._keys) > max(1, self._capacity()):
            self.discard(self._last())

    def first(self) -> Node:
        """The most valuable; there must be one."""
        while True:
            value, number, node = self._best[0]
            if self._keys.get(node) == (value, number):
                return node
            heapq.heappop(self._best)

    def discard(self, node: Node) -> None:
        """Has no effect on a node that does not wait."""
        self._keys.pop(node, None)
        if len(self._best) > 2 * len(self._keys) + 64:
            self._best = [(*key, node) for node, key in self._keys.items()]
            self._worst = [(-key[0], -key[1], node) for node, key in self._keys.items()]
            heapq.heapify(self._best)
            heapq.heapify(self._worst)

    def nodes(self) -> list[Node]:
        return list(self._keys)

    def clear(self) -> None:
        self._keys.clear()
        self._best.clear()
        self._worst.clear()

    def _last(self) -> Node:
        while True:
            value, number, node = self._worst[0]
            if self._keys.get(node) == (-value, -number):
                return node
            heapq.heappop(self._worst)
