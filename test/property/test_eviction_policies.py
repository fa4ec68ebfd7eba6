"""Every eviction policy, over random histories: victims are legal, sufficient and needed.

What the forecast protects goes last, what is needed latest first, and is no more than its share.
"""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.key import namespace_hash
from tiered_kv.forest.node import Node
from tiered_kv.forest.residency import Residency
from tiered_kv.memory.demand import DemandForecast, Expectation
from tiered_kv.memory.eviction import Eviction, eviction_policies
from tiered_kv.memory.forecast_filter import (
    PROTECT_PROBABILITY,
    PROTECT_SHARE,
    PROTECT_WITHIN_S,
)

TIERS = (Tier.DEVICE, Tier.HOST)
KINDS = [
    "insert",
    "insert",
    "match",
    "write",
    "pin",
    "unpin",
    "propose",
    "evict",
    "forecast",
    "forecast",
]
STEPS = st.lists(
    st.tuples(
        st.sampled_from([*KINDS * 3, "clear"]),
        st.lists(st.integers(0, 2), min_size=1, max_size=6),
        st.integers(0, 100),
        st.sampled_from(TIERS),
    ),
    min_size=5,
    max_size=50,
)


class History:
    def __init__(self, policy: str) -> None:
        self.name = policy
        self.forest = Forest(1)
        self.root = self.forest.root(namespace_hash("model"))
        self.policy = Eviction(self.forest, eviction_policies.get(policy))
        self.forecast = DemandForecast()
        self.unsettled: set[Tier] = set()
        self.kept: dict[Tier, list[int]] = {tier: [] for tier in TIERS}
        """Ids of what the forecast protects, nearest first, as of the last victims asked for."""
        self.pinned: list[tuple[Node, Tier]] = []

    def change(self, kind: str, pages: list[int], number: int, tier: Tier) -> None:
        forest = self.forest
        nodes = forest.nodes()
        node = nodes[number % len(nodes)] if nodes else None
        if kind == "insert":
            forest.insert(self.root, array("q", pages), range(len(pages)))
        elif kind == "match":
            forest.match(self.root, array("q", pages))
        elif kind == "clear":
            forest.clear()
            self.pinned.clear()
        elif kind == "unpin" and self.pinned:
            forest.unpin(*self.pinned.pop(number % len(self.pinned)))
        elif node is None:
            return
        elif kind == "write" and node.state(Tier.HOST) is Residency.ABSENT:
            forest.set_resident(node, Tier.HOST, range(node.n_pages))
        elif kind == "pin":
            forest.pin(node, tier)
            self.pinned.append((node, tier))
        elif kind == "forecast":
            # Several, some of them as soon as others, some too late or too improbable.
            expected = {
                other.node_id: Expectation((7.0 * number + 13.0 * at) % 70, 0.4 + 0.3 * (at % 3))
                for at, other in enumerate(nodes[number % len(nodes) :])
            }
            self.forecast = DemandForecast(expected if number % 9 else {})
            self.policy.on_forecast(self.forecast)
            self.unsettled = set(TIERS)

    def settle(self, tier: Tier) -> None:
        """What is kept, the slow way."""
        if tier not in self.unsettled:
            return
        self.unsettled.discard(tier)
        wanted = sorted(
            (expected.starts_in_s, node_id)
            for node_id, expected in self.forecast.next_use.items()
            if expected.starts_in_s <= PROTECT_WITHIN_S
            and expected.probability >= PROTECT_PROBABILITY
        )
        kept = self.kept[tier] = []
        for _, node_id in wanted:
            node, path = self.forest.find(node_id), []
            while node is not None and not node.is_root:
                if node.state(tier) is not Residency.ABSENT and node.node_id not in kept:
                    path.insert(0, node)
                node = node.parent
            pages = sum(self.forest.node(i).n_pages for i in kept)
            pages += sum(node.n_pages for node in path)
            if pages <= PROTECT_SHARE * self.forest.resident_tokens(tier):
                kept += [node.node_id for node in path]

    def check_order(self, tier: Tier, victims: list[Node]) -> None:
        """What is not kept goes first, for LRU in its order; then the rest, the latest first."""
        kept = {node_id: place for place, node_id in enumerate(self.kept[tier])}
        gone: set[Node] = set()
        for victim in victims:
            could_go = [
                node
                for node in self.forest.nodes()
                if node not in gone
                and node.state(tier) is Residency.RESIDENT
                and not node.pins(tier)
                and all(
                    child in gone or child.state(tier) is Residency.ABSENT
                    for child in node.children.values()
                )
            ]
            assert victim in could_go
            others = [node for node in could_go if node.node_id not in kept]
            if not others:
                assert victim is max(could_go, key=lambda node: kept[node.node_id])
            elif self.name == "lru":
                assert victim is min(others, key=lambda node: (node.last_access, node.node_id))
            else:
                assert victim in others
            gone.add(victim)

    def evictable_pages(self, tier: Tier) -> int:
        """Pages at and below which nothing in the tier is pinned or in transfer."""
        counted = 0
        for node in self.forest.nodes():
            if node.state(tier) is Residency.RESIDENT and not node.pins(tier):
                subtree = [node]
                for below in subtree:
                    # A farther tier may have holes: what is below one does not hold it back.
                    subtree += [
                        child
                        for child in below.children.values()
                        if child.state(tier) is not Residency.ABSENT
                    ]
                if not any(below.pins(tier) for below in subtree):
                    counted += node.n_pages
        return counted

    def check_victims(self, tier: Tier, n_pages: int, *, carry_out: bool) -> None:
        self.settle(tier)
        victims = self.policy.victims(tier, n_pages)
        assert len(set(victims)) == len(victims)
        self.check_order(tier, victims)
        pages = sum(node.n_pages for node in victims)
        assert pages >= min(n_pages, self.evictable_pages(tier))
        if victims:
            assert pages - victims[-1].n_pages < n_pages
        for victim in victims if carry_out else []:
            self.forest.evict(victim, tier)


@pytest.mark.parametrize("policy", eviction_policies.names())
@settings(max_examples=120, deadline=None)
@given(steps=STEPS)
def test_victims_are_legal_sufficient_and_needed(
    policy: str, steps: list[tuple[str, list[int], int, Tier]]
) -> None:
    history = History(policy)
    for kind, pages, number, tier in steps:
        if kind in ("propose", "evict"):
            history.check_victims(tier, number % 6, carry_out=kind == "evict")
        else:
            history.change(kind, pages, number, tier)
    for tier in TIERS:
        history.check_victims(tier, 1000, carry_out=True)
        assert history.evictable_pages(tier) == 0


@pytest.mark.parametrize("policy", eviction_policies.names())
@settings(max_examples=30, deadline=None)
@given(steps=STEPS)
def test_ranks_with_the_same_history_name_the_same_victims(
    policy: str, steps: list[tuple[str, list[int], int, Tier]]
) -> None:
    ranks = History(policy), History(policy)
    for kind, pages, number, tier in steps:
        for rank in ranks:
            rank.change(kind, pages, number, tier)
        if kind in ("propose", "evict"):
            names = [
                [node.node_id for node in rank.policy.victims(tier, number % 6)] for rank in ranks
            ]
            assert names[0] == names[1]
            for rank in ranks if kind == "evict" else ():
                for node_id in names[0]:
                    rank.forest.evict(rank.forest.node(node_id), tier)
