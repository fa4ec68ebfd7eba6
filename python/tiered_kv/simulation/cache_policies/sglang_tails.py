"""T-LRU as SGLang has it since 0.5.21 (mem_cache/evict_policy.py, `TLRUStrategy`).

Budget and next prompt are tokens (`--radix-eviction-policy-config`; SGLang's defaults are 0, which
is plain recency), and a leaf counts, and goes, as a whole.
"""

from __future__ import annotations

from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.node import Node
from tiered_kv.memory.costs import EqualCosts
from tiered_kv.simulation.cache_policies.tail_optimized import TailsFirst

#: What may be computed anew within the objective.
BUDGET_TOKENS = 8192


class SglangTails(TailsFirst):
    """Leaves without which the next prefill stays within the budget, then all; oldest first."""

    def __init__(self, forest: Forest, tier: Tier, next_prompt: int, budget: int) -> None:
        """Both in tokens of the forest."""
        super().__init__(forest, tier, EqualCosts(), next_prompt, budget)

    def refresh(self) -> None:
        """All leaves anew, as SGLang does it: one that was split may be safe now."""
        super().refresh()
        self._safe, self._others = [], []
        for node in self._forest.leaves(self._tier):
            self.add(node)

    def _is_tail(self, node: Node) -> bool:
        return self._is_safe(node, node.start)

    def _tail(self, node: Node) -> Node:
        return node
