"""What is expected soon is passed over, within its share, and nothing fails for it."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import pytest

from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.key import namespace_hash
from tiered_kv.forest.node import Node
from tiered_kv.memory.demand import DemandForecast, Expectation
from tiered_kv.memory.eviction import Eviction, eviction_policies
from tiered_kv.memory.forecast_filter import (
    PROTECT_PROBABILITY,
    PROTECT_SHARE,
    PROTECT_WITHIN_S,
)
from tiered_kv.memory.leaf_walk import MayGo
from tiered_kv.memory.lru import LeastRecent

DEVICE, HOST = Tier.DEVICE, Tier.HOST


class Pool:
    """Prompts of pages of one token, `LRU` by default."""

    def __init__(self, policy: str = "lru") -> None:
        self.forest = Forest(1)
        self.root = self.forest.root(namespace_hash("model"))
        self.eviction = Eviction(self.forest, eviction_policies.get(policy))

    def add(self, name: int, n_pages: int = 10, *, below: Iterable[int] = ()) -> Node:
        pages = array("q", [*below, *(1000 * name + at for at in range(n_pages))])
        return self.forest.insert(self.root, pages, range(len(pages))).last

    def expect(self, *expected: tuple[Node, float]) -> None:
        self.eviction.on_forecast(
            DemandForecast({node.node_id: Expectation(at_s) for node, at_s in expected})
        )

    def victims(self, n_pages: int, tier: Tier = DEVICE) -> list[Node]:
        return self.eviction.victims(tier, n_pages)


def test_what_is_expected_is_passed_over_until_the_forecast_drops_it() -> None:
    pool = Pool()
    first, second, third = (pool.add(name) for name in range(3))
    assert pool.victims(10) == [first]
    pool.expect((first, 1.0))
    assert pool.victims(10) == [second]
    assert pool.victims(20) == [second, third]
    pool.expect()
    assert pool.victims(10) == [first]


def test_the_same_on_the_host() -> None:
    pool = Pool()
    first, second, third = (pool.add(name) for name in range(3))
    for node in (first, second, third):
        pool.forest.set_resident(node, HOST, range(10))
    pool.expect((first, 1.0))
    assert pool.victims(10, HOST) == [second]


def test_when_nothing_else_is_left_what_is_needed_latest_goes_first() -> None:
    pool = Pool()
    soon, later, other, _ = (pool.add(name) for name in range(4))
    pool.expect((soon, 1.0), (later, 2.0))
    assert pool.victims(40)[2:] == [later, soon]
    # The same again: proposals that were not carried out change nothing.
    assert pool.victims(40)[2:] == [later, soon]
    assert pool.victims(10) == [other]


def test_only_so_much_is_protected_nearest_first() -> None:
    pool = Pool()
    nodes = [pool.add(name) for name in range(10)]
    # All but the newest are expected, the older the later, and half of the tier may be.
    assert PROTECT_SHARE == 0.5
    pool.expect(*((node, 10.0 - at) for at, node in enumerate(nodes[:9])))
    order = pool.victims(100)
    assert order[:5] == [*nodes[:4], nodes[9]]
    assert order[5:] == nodes[4:9]


def test_what_does_not_fit_in_the_share_leaves_it_to_what_does() -> None:
    pool = Pool()
    huge, small, other = pool.add(1, 60), pool.add(2, 10), pool.add(3, 10)
    pool.expect((huge, 1.0), (small, 2.0))
    assert pool.victims(60) == [huge]
    assert pool.victims(80) == [huge, other, small]


def test_what_is_above_something_expected_stays_even_if_that_is_gone() -> None:
    pool = Pool()
    parent = pool.add(1)
    child = pool.add(2, 5, below=parent.tokens)
    other = pool.add(3)
    pool.forest.set_resident(child, HOST, range(5))
    pool.forest.evict(child, DEVICE)
    assert pool.victims(1) == [parent]
    pool.expect((child, 1.0))
    assert pool.victims(1) == [other]


def test_what_two_expected_prompts_share_counts_once() -> None:
    pool = Pool()
    shared = pool.add(1, 30)
    first, second = (pool.add(name, 10, below=shared.tokens) for name in (2, 3))
    other = pool.add(4, 50)
    pool.expect((first, 1.0), (second, 2.0))
    # 50 of 100 pages, and so within the half.
    assert pool.victims(1) == [other]
    assert pool.victims(60) == [other, second]


@pytest.mark.parametrize(
    ("starts_in_s", "probability"),
    [(PROTECT_WITHIN_S * 1.01, 1.0), (1.0, PROTECT_PROBABILITY * 0.99)],
)
def test_too_late_or_too_improbable_protects_nothing(
    starts_in_s: float, probability: float
) -> None:
    pool = Pool()
    first, *_ = [pool.add(name) for name in range(3)]
    expectation = Expectation(starts_in_s, probability)
    pool.eviction.on_forecast(DemandForecast({first.node_id: expectation}))
    assert pool.victims(1) == [first]


def test_a_policy_may_be_told_to_ignore_forecasts() -> None:
    pool = Pool()
    pool.eviction = Eviction(pool.forest, LeastRecent, protect_expected=False)
    first, *_ = [pool.add(name) for name in range(3)]
    pool.expect((first, 1.0))
    assert pool.victims(1) == [first]


def test_nodes_that_left_the_forest_are_forgotten() -> None:
    pool = Pool()
    first, second, third = (pool.add(name) for name in range(3))
    pool.expect((first, 1.0))
    assert pool.victims(1) == [second]
    pool.forest.clear()
    fourth = pool.add(4)
    assert pool.victims(100) == [fourth]
    pool.expect((first, 1.0), (third, 2.0))
    assert pool.victims(100) == [fourth]


def test_what_is_used_after_it_was_passed_over_has_its_new_place() -> None:
    pool = Pool()
    first, second, third = (pool.add(name) for name in range(3))
    pool.expect((first, 1.0))
    assert pool.victims(1) == [second]
    pool.forest.match(pool.root, first.tokens)
    pool.expect()
    assert pool.victims(100) == [second, third, first]


def test_each_is_passed_over_once_however_often_victims_are_wanted() -> None:
    pops = 0

    class Counted(LeastRecent):
        def pop(self, may_go: MayGo) -> Node | None:
            nonlocal pops
            pops += 1
            return super().pop(may_go)

    pool = Pool()
    pool.eviction = Eviction(pool.forest, Counted)
    nodes = [pool.add(name) for name in range(200)]
    pool.expect(*((node, 1.0) for node in nodes[:50]))
    assert pool.victims(10) == [nodes[50]]
    assert pops == 51
    for _ in range(10):
        assert pool.victims(10) == [nodes[50]]
    assert pops == 61
