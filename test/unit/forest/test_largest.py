"""The largest prefixes of forests that are wide, deep or gone; histories are in test/property/."""

from __future__ import annotations

from array import array

from support_forest.compared import check_largest
from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.key import namespace_hash
from tiered_kv.forest.largest import LargestPrefixes
from tiered_kv.forest.node import Node


def forest_with_index() -> tuple[Forest, LargestPrefixes, Node]:
    forest = Forest(1)
    return forest, LargestPrefixes(forest), forest.root(namespace_hash("largest"))


def insert(forest: Forest, root: Node, *tokens: int) -> Node:
    return forest.insert(root, array("q", tokens), range(len(tokens))).last


def test_a_chain_is_chosen_from_the_top() -> None:
    forest, largest, root = forest_with_index()
    for end in range(1, 50):
        insert(forest, root, *range(end))
    chosen = largest.largest(7)
    assert [node.end for node in chosen] == [1, 2, 3, 4, 5, 6, 7]
    check_largest(forest, largest)


def test_the_largest_of_many_siblings() -> None:
    forest, largest, root = forest_with_index()
    for first in range(1000):
        insert(forest, root, first, *range(first % 3))
    insert(forest, root, *range(2000, 2400))
    insert(forest, root, *range(3000, 3100))
    assert [node.n_tokens for node in largest.largest(2)] == [400, 100]
    check_largest(forest, largest)


def test_trees_that_come_and_go_leave_nothing() -> None:
    forest = Forest(1)
    largest = LargestPrefixes(forest)
    for tenant in range(20):
        node = insert(forest, forest.root(namespace_hash("tenant", tenant)), 1, 2, 3)
        forest.evict(node, Tier.DEVICE)
    assert largest.sizes == {}
    assert largest.tokens == 0
    assert largest.largest(5) == []


def test_a_flush() -> None:
    forest, largest, root = forest_with_index()
    insert(forest, root, 1, 2, 3)
    forest.clear()
    assert largest.sizes == {}
    insert(forest, root, 4, 5)
    check_largest(forest, largest)
