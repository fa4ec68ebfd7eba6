"""LRU eviction against a naive search, over random histories.

The naive policy looks at every node, takes the one used longest ago among those that may go, counts
it as gone, and starts again. The real one must name the same nodes in the same order, whether or
not its earlier proposals were carried out.
"""

from __future__ import annotations

from array import array
from typing import Literal, TypeAlias

from hypothesis import given, settings
from hypothesis import strategies as st

from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.key import namespace_hash
from tiered_kv.forest.node import Node
from tiered_kv.forest.residency import Residency
from tiered_kv.memory.eviction import Eviction
from tiered_kv.memory.lru import LeastRecent

ABSENT, RESIDENT = Residency.ABSENT, Residency.RESIDENT
TIERS = (Tier.DEVICE, Tier.HOST)

Kind: TypeAlias = Literal["insert", "match", "write", "pin", "unpin", "propose", "evict", "clear"]
KINDS: list[Kind] = ["insert", "match", "write", "pin", "unpin", "propose", "evict", "evict"]
STEPS = st.lists(
    st.tuples(
        st.sampled_from([*KINDS * 3, "clear"]),
        st.lists(st.integers(0, 2), max_size=5),
        st.integers(0, 100),
        st.sampled_from(TIERS),
    ),
    min_size=10,
    max_size=40,
)
GROWN = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=4, max_size=8)


def naive_victims(forest: Forest, tier: Tier, n_pages: int) -> list[Node]:
    victims: list[Node] = []
    while sum(node.n_pages for node in victims) < n_pages:
        candidates = [
            node
            for node in forest.nodes()
            if node not in victims
            and node.state(tier) is RESIDENT
            and not node.pins(tier)
            and all(
                child in victims or child.state(tier) is ABSENT for child in node.children.values()
            )
        ]
        if not candidates:
            break
        victims.append(min(candidates, key=lambda node: (node.last_access, node.node_id)))
    return victims


class History:
    """A forest and what may happen to it."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.forest = Forest(page_size)
        self.root = self.forest.root(namespace_hash("model"))
        self.pinned: list[tuple[Node, Tier]] = []

    def insert(self, pages: list[int]) -> None:
        tokens = self.tokens(pages)
        self.forest.insert(self.root, tokens, range(len(tokens)))

    def tokens(self, pages: list[int]) -> array[int]:
        return array("q", [page for page in pages for _ in range(self.page_size)])

    def change(self, kind: Kind, pages: list[int], number: int, tier: Tier) -> None:
        forest = self.forest
        nodes = forest.nodes()
        node = nodes[number % len(nodes)] if nodes else None
        if kind == "insert":
            self.insert(pages)
        elif kind == "match":
            forest.match(self.root, self.tokens(pages))
        elif kind == "write" and node is not None and node.state(Tier.HOST) is ABSENT:
            forest.set_resident(node, Tier.HOST, range(node.n_pages))
        elif kind == "pin" and node is not None:
            forest.pin(node, tier)
            self.pinned.append((node, tier))
        elif kind == "unpin" and self.pinned:
            forest.unpin(*self.pinned.pop(number % len(self.pinned)))
        elif kind == "clear":
            forest.clear()
            self.pinned.clear()


@settings(max_examples=300, deadline=None)
@given(grown=GROWN, steps=STEPS, page_size=st.sampled_from([1, 4]))
def test_names_the_same_nodes_in_the_same_order(
    grown: list[list[int]], steps: list[tuple[Kind, list[int], int, Tier]], page_size: int
) -> None:
    history = History(page_size)
    forest, policy = history.forest, Eviction(history.forest, LeastRecent)
    for pages in grown:
        history.insert(pages)
    for kind, pages, number, tier in steps:
        history.change(kind, pages, number, tier)
        if kind in ("propose", "evict"):
            n_pages = number % 5
            expected = naive_victims(forest, tier, n_pages)
            assert policy.victims(tier, n_pages) == expected
            for victim in expected if kind == "evict" else []:
                forest.evict(victim, tier)
    for tier in TIERS:
        assert policy.victims(tier, 1000) == naive_victims(forest, tier, 1000)
