"""The list of what waits to be written, against a sorted list."""

from __future__ import annotations

from array import array

from hypothesis import given
from hypothesis import strategies as st

from tiered_kv.forest.forest import Forest
from tiered_kv.forest.key import namespace_hash
from tiered_kv.forest.node import Node
from tiered_kv.memory.deferred import DeferredNodes

CAPACITY = 5


@given(
    values=st.lists(st.integers(0, 3), min_size=12, max_size=12),
    steps=st.lists(st.tuples(st.sampled_from(["add", "add", "discard"]), st.integers(0, 11))),
)
def test_the_most_valuable_first_then_the_oldest_and_the_least_valuable_is_left_out(
    values: list[int], steps: list[tuple[str, int]]
) -> None:
    forest = Forest(1)
    root = forest.root(namespace_hash("model"))
    nodes = [forest.insert(root, array("q", [n]), range(1)).last for n in range(12)]
    value = dict(zip(nodes, map(float, values), strict=True))
    deferred = DeferredNodes(value.__getitem__, lambda: CAPACITY)
    expected: list[Node] = []
    for step, n in steps:
        node = nodes[n]
        if step == "add":
            deferred.add(node)
            if node not in expected:
                expected.append(node)
                # Stable: of equals, the oldest first.
                kept = sorted(expected, key=lambda node: -value[node])[:CAPACITY]
                expected = [node for node in expected if node in kept]
        else:
            deferred.discard(node)
            expected = [other for other in expected if other is not node]
        assert set(deferred.nodes()) == set(expected)
        assert len(deferred) == len(expected)
        if expected:
            assert deferred.first() is max(expected, key=value.__getitem__)
    assert all((node in deferred) == (node in expected) for node in nodes)


def test_it_does_not_grow_with_what_has_come_and_gone() -> None:
    forest = Forest(1)
    root = forest.root(namespace_hash("model"))
    deferred = DeferredNodes(lambda node: 1.0, lambda: 100)
    for n in range(1000):
        node = forest.insert(root, array("q", [n]), range(1)).last
        deferred.add(node)
        deferred.discard(node)
    assert len(deferred) == 0
    assert len(deferred._best) <= 100
    assert len(deferred._worst) <= 100
