"""What goes to a store that servers share.

Guarantee: what was used twice, or takes long to compute; never what is sooner computed than read.
"""

from __future__ import annotations

from array import array

import pytest

from tiered_kv.core.config import MemoryConfig
from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.node import Node
from tiered_kv.memory.costs import Costs
from tiered_kv.memory.manager import MemoryManager
from tiered_kv.memory.store_value import is_worth_sharing

SIZE = 16
TIERS = tuple(Tier)


class PerToken:
    """So many seconds to compute a token, and to read one."""

    def __init__(self, compute_s: float, read_s: float, latency_s: float = 0.0) -> None:
        self._compute_s, self._read_s, self._latency_s = compute_s, read_s, latency_s

    def bytes_per_token(self, tier: Tier) -> float:
        return 1000.0

    def recompute_s(self, start: int, end: int) -> float:
        return (end - start) * self._compute_s

    def load_s(self, source: Tier, target: Tier, n_bytes: int, queued_bytes: int = 0) -> float:
        return self._latency_s + n_bytes / 1000 * self._read_s


FAST = PerToken(1e-4, 1e-5)


def node_of(n_pages: int, uses: int = 0) -> tuple[Forest, Node]:
    forest = Forest(SIZE, tiers=TIERS)
    root = forest.root(b"r" * 32)
    tokens = array("q", range(n_pages * SIZE))
    node = forest.insert(root, tokens, array("q", range(n_pages)), tier=Tier.HOST).last
    for _ in range(uses):
        forest.match(root, tokens)
    return forest, node


@pytest.mark.parametrize(
    ("n_pages", "uses", "costs", "is_worth"),
    [
        (4, 0, FAST, False),
        (4, 1, FAST, True),
        (400, 0, FAST, True),  # 0.64 s of computing
        (300, 0, FAST, False),  # 0.48 s
        (400, 0, PerToken(1e-4, 2e-4), False),
        (4, 9, PerToken(1e-4, 2e-4), False),
        (4, 1, PerToken(1e-4, 1e-5, latency_s=1.0), True),  # paid once, not for each page
        (4, 0, None, False),
        (400, 0, None, False),
        (4, 1, None, True),
    ],
)
def test_what_is_worth_sharing(
    n_pages: int, uses: int, costs: Costs | None, is_worth: bool
) -> None:
    _, node = node_of(n_pages, uses)
    assert is_worth_sharing(node, Tier.STORE, costs, SIZE) is is_worth


def test_what_hangs_from_a_second_use_is_shared_as_far_as_it_was_used() -> None:
    forest, node = node_of(8)
    root = node.parent
    assert root is not None
    forest.match(root, array("q", range(5 * SIZE)))
    upper = node.parent
    assert upper is not None
    shares = [is_worth_sharing(each, Tier.STORE, FAST, SIZE) for each in (upper, node)]
    assert (upper.n_pages, shares) == (5, [True, False])


@pytest.mark.parametrize(
    ("writes", "once", "twice", "leaving"),
    [("value", 0, 1, 1), ("all", 1, 1, 1), ("none", 0, 0, 0)],
)
def test_the_option(writes: str, once: int, twice: int, leaving: int) -> None:
    forest, node = node_of(4)
    manager = MemoryManager(forest, MemoryConfig(store_writes=writes), FAST)
    assert len(manager.on_host_resident([node], Tier.STORE)) == once
    assert len(manager.on_leave([node], Tier.STORE)) == leaving
    assert len(manager.on_host_resident([node], Tier.DISK)) == 1, "the disk takes all"
    node.hits = 1
    assert len(manager.on_host_resident([node], Tier.STORE)) == twice
