"""LRU eviction: the order by example, and work in proportion to what changed.

test/property/test_lru.py compares the order with a naive search over random histories.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import pytest

from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.key import namespace_hash
from tiered_kv.forest.node import Node
from tiered_kv.memory import lru
from tiered_kv.memory.eviction import Eviction
from tiered_kv.memory.lru import LeastRecent

DEVICE, HOST = Tier.DEVICE, Tier.HOST


@pytest.fixture
def forest() -> Forest:
    return Forest(2)


@pytest.fixture
def root(forest: Forest) -> Node:
    return forest.root(namespace_hash("model"))


def add(forest: Forest, root: Node, *pages: int) -> Node:
    tokens = array("q", [token for page in pages for token in (page, page)])
    return forest.insert(root, tokens, list(range(len(tokens)))).last


def use(forest: Forest, root: Node, *pages: int) -> None:
    forest.match(root, array("q", [token for page in pages for token in (page, page)]))


def test_the_least_recently_used_leaf_goes_first(forest: Forest, root: Node) -> None:
    policy = Eviction(forest, LeastRecent)
    first, second, third = (add(forest, root, page) for page in (1, 2, 3))
    assert policy.victims(DEVICE, 2) == [first, second]
    use(forest, root, 1)
    assert policy.victims(DEVICE, 2) == [second, third]
    assert policy.victims(DEVICE, 99) == [second, third, first]


def test_a_parent_competes_once_its_children_are_gone(forest: Forest, root: Node) -> None:
    policy = Eviction(forest, LeastRecent)
    parent = add(forest, root, 1)
    old_child = add(forest, root, 1, 5)
    other = add(forest, root, 2)
    new_child = add(forest, root, 1, 6)
    # The parent was used together with its newest child, and can't go before it.
    assert policy.victims(DEVICE, 99) == [old_child, other, new_child, parent]


def test_it_stops_when_there_is_enough(forest: Forest, root: Node) -> None:
    policy = Eviction(forest, LeastRecent)
    big = add(forest, root, 1, 2, 3)
    add(forest, root, 4)
    assert policy.victims(DEVICE, 0) == []
    assert policy.victims(DEVICE, 2) == [big]


def test_what_was_pinned_and_released_competes_again_once(forest: Forest, root: Node) -> None:
    policy = Eviction(forest, LeastRecent)
    first, second = add(forest, root, 1), add(forest, root, 2)
    for _ in range(5):
        forest.pin(first, DEVICE)
        assert policy.victims(DEVICE, 9) == [second]
        forest.unpin(first, DEVICE)
        assert policy.victims(DEVICE, 2) == [first, second]


def test_a_node_that_became_a_leaf_twice_counts_once(forest: Forest, root: Node) -> None:
    policy = Eviction(forest, LeastRecent)
    first, second = add(forest, root, 1), add(forest, root, 2)
    assert policy.victims(DEVICE, 1) == [first]
    forest.pin(first, DEVICE)
    forest.unpin(first, DEVICE)
    assert policy.victims(DEVICE, 2) == [first, second]


def test_forgotten_nodes_are_not_kept_in_memory_or_proposed(forest: Forest, root: Node) -> None:
    policy = Eviction(forest, LeastRecent)
    add(forest, root, 1)
    assert len(policy.victims(DEVICE, 1)) == 1
    forest.clear()
    assert policy.victims(DEVICE, 1) == []
    again = add(forest, root, 1)
    assert policy.victims(DEVICE, 1) == [again]


def test_the_heap_stays_in_proportion_to_the_leaves(forest: Forest, root: Node) -> None:
    heaps = {tier: LeastRecent(forest, tier) for tier in forest.tiers}
    policy = Eviction(forest, lambda _, tier: heaps[tier])
    nodes = [add(forest, root, page) for page in range(10)]
    for _ in range(200):
        for node in nodes:
            forest.pin(node, DEVICE)
            forest.unpin(node, DEVICE)
        policy.victims(DEVICE, 3)
    assert len(heaps[DEVICE]._entries) <= 2 * 10 + heaps[DEVICE]._SLACK + 3


def test_a_call_costs_what_it_evicts_not_what_there_is(
    forest: Forest, root: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Eviction(forest, LeastRecent)
    for page in range(2000):
        add(forest, root, page)
    policy.victims(DEVICE, 1)
    n_pushed = n_popped = 0
    push, pop = lru.heapq.heappush, lru.heapq.heappop

    def counted_push(heap: list[tuple[int, int]], entry: tuple[int, int]) -> None:
        nonlocal n_pushed
        n_pushed += 1
        push(heap, entry)

    def counted_pop(heap: list[tuple[int, int]]) -> tuple[int, int]:
        nonlocal n_popped
        n_popped += 1
        return pop(heap)

    monkeypatch.setattr(lru.heapq, "heappush", counted_push)
    monkeypatch.setattr(lru.heapq, "heappop", counted_pop)
    evict(forest, policy.victims(DEVICE, 5))
    evict(forest, policy.victims(DEVICE, 5))
    assert n_popped <= 2 * 5 + 5  # the second call meets the first one's stale entries
    assert n_pushed <= 2 * 5


def evict(forest: Forest, nodes: Iterable[Node]) -> None:
    for node in nodes:
        forest.evict(node, DEVICE)


def test_what_is_not_used_again_goes_first_up_to_what_others_go_through(
    forest: Forest, root: Node
) -> None:
    policy = Eviction(forest, LeastRecent)
    old = add(forest, root, 1)
    shared = add(forest, root, 2)
    prompt = add(forest, root, 2, 3)
    answer = add(forest, root, 2, 3, 4)
    sibling = add(forest, root, 2, 5)
    assert policy.victims(DEVICE, 1) == [old]
    policy.let_go(prompt)
    assert policy.victims(DEVICE, 1) == [old], "somebody goes on from there"
    policy.let_go(answer)
    assert policy.victims(DEVICE, 99) == [answer, prompt, old, sibling, shared]
    use(forest, root, 2, 3, 4)
    assert policy.victims(DEVICE, 99)[0] == old


def test_a_whole_path_that_nobody_shares_goes(forest: Forest, root: Node) -> None:
    policy = Eviction(forest, LeastRecent)
    old, first = add(forest, root, 1), add(forest, root, 2)
    last = add(forest, root, 2, 3)
    policy.let_go(last)
    assert policy.victims(DEVICE, 99) == [last, first, old]
