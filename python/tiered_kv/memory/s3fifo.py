"""S3-FIFO: a small queue that lets one-time prompts pass, a main queue for the rest.

Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023; adapted to trees: only
leaves are queued, and a page hash stands for a node in the ghost queue.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.node import Node
from tiered_kv.memory.leaf_walk import MayGo, NewLeaves
from tiered_kv.memory.uses import UseCounter

#: The small queue's share of the tier.
SMALL_SHARE = 0.1


class Queues:
    """What was not used again while in the small queue, else the main queue in turn.

    Node ids in order of entry, with their pages.
    """

    _GHOSTS_MIN = 256

    def __init__(self, forest: Forest, tier: Tier) -> None:
        self._forest = forest
        self._tier = tier
        self._new = NewLeaves(forest, tier)
        self._uses = UseCounter(forest)
        self._small: OrderedDict[int, int] = OrderedDict()
        self._main: OrderedDict[int, int] = OrderedDict()
        self._small_pages = 0
        self._ghosts: OrderedDict[bytes, None] = OrderedDict()
        self._popped_from_main: set[int] = set()

    def refresh(self) -> None:
        for node in self._new.take():
            self._uses.look(node)
            if node.node_id in self._small or node.node_id in self._main:
                continue
            returns = self._ghosts.pop(node.last_page_hash, False) is None
            self._append(node, to_main=returns or self._uses.uses(node) > 0)

    def add(self, node: Node) -> None:
        # It has had children, so it was used after it was made.
        self._uses.look(node)
        if node.node_id not in self._small and node.node_id not in self._main:
            self._append(node, to_main=True)

    def put_back(self, victims: Iterable[Node]) -> None:
        for node in reversed(list(victims)):
            to_main = node.node_id in self._popped_from_main
            self._append(node, to_main=to_main)
            (self._main if to_main else self._small).move_to_end(node.node_id, last=False)
        self._popped_from_main.clear()

    def pop(self, may_go: MayGo) -> Node | None:
        while self._small or self._main:
            total = self._forest.resident_tokens(self._tier) / self._forest.page_size
            from_small = not self._main or self._small_pages > SMALL_SHARE * total
            from_small = from_small and bool(self._small)
            node = self._take_first(from_small, may_go)
            if node is None:
                continue
            self._uses.look(node)
            uses = self._uses.uses(node)
            if uses:
                # To the main queue with a clean slate; within it, each use buys one more round.
                self._uses.set(node, 0 if from_small else uses - 1)
                self._append(node, to_main=True)
                continue
            if from_small:
                self._remember(node)
            else:
                self._popped_from_main.add(node.node_id)
            return node
        return None

    def _take_first(self, from_small: bool, may_go: MayGo) -> Node | None:
        """The first of a queue, taken out of it; None if it may not go now."""
        node_id, n_pages = (self._small if from_small else self._main).popitem(last=False)
        if from_small:
            self._small_pages -= n_pages
        node = self._forest.find(node_id)
        return node if node is not None and may_go(node) else None

    def _append(self, node: Node, *, to_main: bool) -> None:
        if to_main:
            self._main[node.node_id] = node.n_pages
        else:
            self._small[node.node_id] = node.n_pages
            self._small_pages += node.n_pages

    def _remember(self, node: Node) -> None:
        self._ghosts[node.last_page_hash] = None
        limit = max(self._GHOSTS_MIN, len(self._forest.leaves(self._tier)))
        while len(self._ghosts) > limit:
            self._ghosts.popitem(last=False)
