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
from tiered_kv.memory.lru import LruEviction

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
    max_size=40,
)


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


@settings(max_examples=200, deadline=None)
@given(steps=STEPS, page_size=st.sampled_from([1, 4]))
def test_names_the_same_nodes_in_the_same_order(
    steps: list[tuple[Kind, list[int], int, Tier]], page_size: int
) -> None:
    forest = Forest(page_size)
    root = forest.root(namespace_hash("model"))
    policy = LruEviction(forest)
    pinned: list[tuple[Node, Tier]] = []
    for kind, pages, number, tier in steps:
        tokens = array("q", [page for page in pages for _ in range(page_size)])
        nodes = forest.nodes()
        node = nodes[number % len(nodes)] if nodes else None
        if kind == "insert":
            forest.insert(root, tokens, range(len(tokens)))
        elif kind == "match":
            forest.match(root, tokens)
        elif kind == "write" and node is not None and node.state(Tier.HOST) is ABSENT:
            forest.set_resident(node, Tier.HOST, range(node.n_pages))
        elif kind == "pin" and node is not None:
            forest.pin(node, tier)
            pinned.append((node, tier))
        elif kind == "unpin" and pinned:
            forest.unpin(*pinned.pop(number % len(pinned)))
        elif kind == "propose":
            assert policy.victims(tier, number % 9) == naive_victims(forest, tier, number % 9)
        elif kind == "evict":
            expected = naive_victims(forest, tier, number % 4)
            assert policy.victims(tier, number % 4) == expected
            for victim in expected:
                forest.evict(victim, tier)
        elif kind == "clear":
            forest.clear()
            pinned.clear()
    for tier in TIERS:
        assert policy.victims(tier, 1000) == naive_victims(forest, tier, 1000)
