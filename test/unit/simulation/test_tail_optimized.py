"""T-LRU: tails that cost no first token its objective go first, and no more than these."""

from __future__ import annotations

from array import array

from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.key import namespace_hash
from tiered_kv.forest.node import Node
from tiered_kv.memory.costs import EqualCosts
from tiered_kv.memory.eviction import Eviction
from tiered_kv.simulation.cache_policies.tail_optimized import BUDGET_S, TailsFirst

DEVICE = Tier.DEVICE
#: Tokens that can be computed within the budget; the next prompt takes 10 of them.
WITHIN_BUDGET, NEXT_PROMPT = 50, 10


class Linear(EqualCosts):
    def recompute_s(self, start: int, end: int) -> float:
        return (end - start) * BUDGET_S / WITHIN_BUDGET


class Pool:
    def __init__(self) -> None:
        self.forest = Forest(1)
        self.root = self.forest.root(namespace_hash("model"))
        self.eviction = Eviction(
            self.forest, lambda *place: TailsFirst(*place, Linear(), NEXT_PROMPT)
        )

    def add(self, name: int, n_pages: int) -> Node:
        """The first `n_pages` of a conversation."""
        pages = array("q", range(1000 * name, 1000 * name + n_pages))
        return self.forest.insert(self.root, pages, range(n_pages)).last

    def evict(self, n_pages: int) -> list[tuple[int, int, int]]:
        """Conversation, begin and end of what goes."""
        gone = []
        for node in self.eviction.victims(DEVICE, n_pages):
            gone.append((node.tokens[0] // 1000, node.start, node.end))
            self.forest.evict(node, DEVICE)
        return gone


def test_short_conversations_and_tails_go_first_then_the_rest_by_recency() -> None:
    pool = Pool()
    for name, n_pages in ((1, 200), (2, 60), (3, 40)):
        pool.add(name, n_pages)
    # Of the first two the last 40 may go, of the third all.
    assert pool.evict(1) == [(1, 160, 200)]
    assert pool.evict(41) == [(2, 20, 60), (3, 0, 40)]
    assert pool.evict(1000) == [(1, 0, 160), (2, 0, 20)]


def test_a_conversation_is_not_walked_down_tail_by_tail() -> None:
    pool = Pool()
    pool.add(1, 200)
    assert pool.evict(1) == [(1, 160, 200)]
    pool.add(2, 100)
    # Newer, but its tail is all that can go unnoticed.
    assert pool.evict(1) == [(2, 60, 100)]


def test_a_conversation_that_grew_has_a_new_tail() -> None:
    pool = Pool()
    pool.add(1, 100)
    pool.add(2, 100)
    pool.add(1, 300)
    assert pool.evict(1) == [(2, 60, 100)]
    assert pool.evict(1) == [(1, 260, 300)]
    assert pool.evict(1) == [(2, 0, 60)]
