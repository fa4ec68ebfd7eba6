"""T-LRU (Zhang et al., arXiv 2510.15152), as SGLang has had it since 0.5.21: tails first.

Of a conversation of L tokens whose next prompt adds Q, a leaf may go at no cost to tail latency if
what is before it leaves the next prefill within a budget: computing from there to L + Q takes no
longer than the objective for the first token. Such leaves go first, then all others; both least
recently used first. L is the greatest depth that the branch had, whatever was evicted of it since,
or a conversation would be walked down to nothing.

SGLang gives the budget and Q as numbers of tokens; here the budget is seconds by the cost model, as
a service states it. SGLang takes whole leaves; here a leaf is split where the budget falls.
`sglang_tails.py` is SGLang's way.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.node import Node
from tiered_kv.memory.costs import Costs
from tiered_kv.memory.leaf_walk import MayGo, NewLeaves

#: What the next prefill may take.
BUDGET_S = 0.5
#: Tokens that the next prompt is expected to add.
NEXT_PROMPT_TOKENS = 1024


class TailsFirst:
    """The leaves of one tier in two lazy heaps by last access: safe tails, and the rest."""

    _SLACK = 64

    def __init__(
        self, forest: Forest, tier: Tier, costs: Costs, next_prompt: int, budget: float = BUDGET_S
    ) -> None:
        """next_prompt: what it is expected to add, in tokens of the forest; budget: what the next
        prefill may cost, by `costs`."""
        self._forest = forest
        self._tier = tier
        self._costs = costs
        self._next_prompt = next_prompt
        self._budget = budget
        self._new = NewLeaves(forest, tier)
        self._safe: list[tuple[int, int]] = []
        self._others: list[tuple[int, int]] = []
        self._depths: dict[int, int] = {}
        """Greatest end of a branch through a node, in tokens, by node id."""

    def refresh(self) -> None:
        for node in self._new.take():
            self._see(node)
            self.add(node)
        if len(self._depths) > 2 * len(self._forest) + self._SLACK:
            find = self._forest.find
            self._depths = {i: depth for i, depth in self._depths.items() if find(i) is not None}
        leaves = self._forest.leaves(self._tier)
        if len(self._safe) + len(self._others) > 4 * len(leaves) + self._SLACK:
            self._safe, self._others = [], []
            for node in leaves:
                self.add(node)

    def add(self, node: Node) -> None:
        self._depths.setdefault(node.node_id, self.depth(node))
        heap = self._safe if self._is_tail(node) else self._others
        heapq.heappush(heap, (node.last_access, node.node_id))

    def put_back(self, victims: Iterable[Node]) -> None:
        for node in victims:
            self.add(node)

    def pop(self, may_go: MayGo) -> Node | None:
        for heap in (self._safe, self._others):
            while heap:
                last_access, node_id = heapq.heappop(heap)
                node = self._forest.find(node_id)
                if node is None or not may_go(node):
                    continue
                if node.last_access != last_access:
                    # Used since it was pushed: its place is farther back.
                    self.add(node)
                elif heap is self._others:
                    return node
                elif self._is_tail(node):
                    return self._tail(node)
                else:
                    self.add(node)
        return None

    def _is_tail(self, node: Node) -> bool:
        """Whether a part of it may go."""
        return self._is_safe(node, node.end - self._forest.page_size)

    def depth(self, node: Node) -> int:
        """The greatest that a branch through it had, in tokens."""
        known = self._depths.get(node.node_id)
        if known is None:  # the upper part of a node that was split has all branches that it had
            known = max(map(self.depth, node.children.values()), default=node.end)
        return known

    def _is_safe(self, node: Node, kept: int) -> bool:
        """Whether the next prompt can be computed in time from token `kept` on."""
        n_tokens = self.depth(node) + self._next_prompt
        return self._costs.recompute_s(max(0, kept), n_tokens) <= self._budget

    def _tail(self, node: Node) -> Node:
        """The part of a leaf that may go: all of it, or what is left below a cut."""
        page = self._forest.page_size
        low, high = 0, node.n_pages - 1
        while low < high:
            middle = (low + high) // 2
            if self._is_safe(node, node.start + middle * page):
                high = middle
            else:
                low = middle + 1
        if low:
            upper = self._forest.split(node, low)[0]
            self._depths[upper.node_id] = self.depth(node)
        return node

    def _see(self, node: Node) -> None:
        """A branch may have grown: whoever is above is as deep as its deepest branch."""
        depth = self._depths[node.node_id] = self.depth(node)
        at = node.parent
        while at is not None and not at.is_root:
            depth = self._depths[at.node_id] = max(self.depth(at), depth)
            at = at.parent
