"""match, insert, extend and split by example: what is shared, what is adopted, who keeps what.

The stateful test in test/property covers the combinations; these name the promises one by one.
"""

from __future__ import annotations

import gc
from array import array

import numpy as np
import pytest

from tiered_kv.core.errors import IntegrityError
from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.key import namespace_hash, page_hashes
from tiered_kv.forest.node import Node
from tiered_kv.forest.residency import Residency

DEVICE, HOST, DISK = Tier.DEVICE, Tier.HOST, Tier.DISK
ROOT_HASH = namespace_hash("model")


@pytest.fixture
def forest() -> Forest:
    return Forest(4)


@pytest.fixture
def root(forest: Forest) -> Node:
    return forest.root(ROOT_HASH)


def tokens_of(n_tokens: int, first: int = 0) -> array[int]:
    return array("q", range(first, first + n_tokens))


def device_slots(nodes: tuple[Node, ...]) -> list[int]:
    slots: list[int] = []
    for node in nodes:
        held = node.slots(DEVICE)
        assert isinstance(held, list)
        slots += held
    return slots


def test_what_was_inserted_is_matched_with_its_slots(forest: Forest, root: Node) -> None:
    slots = list(range(100, 112))
    result = forest.insert(root, tokens_of(14), slots)  # two tokens fill no page
    assert result.resident_tokens == 0
    assert result.adopted == (result.last,)
    assert result.last.page_hashes == page_hashes(ROOT_HASH, tokens_of(12), 4)
    match = forest.match(root, tokens_of(30))
    assert match.n_tokens == 12
    assert match.last is result.last
    assert device_slots(match.path) == slots


def test_nothing_is_shared_between_namespaces(forest: Forest, root: Node) -> None:
    forest.insert(root, tokens_of(8), list(range(8)))
    other = forest.root(namespace_hash("other model"))
    match = forest.match(other, tokens_of(8))
    assert (match.n_tokens, match.path, match.last) == (0, (), other)


def test_too_little_for_a_page_changes_nothing(forest: Forest, root: Node) -> None:
    result = forest.insert(root, tokens_of(3), [])
    assert (result.resident_tokens, result.last, result.adopted) == (0, root, ())
    assert len(forest) == 0


def test_a_longer_prompt_adds_only_what_is_new(forest: Forest, root: Node) -> None:
    first = forest.insert(root, tokens_of(8), list(range(8)))
    second = forest.insert(root, tokens_of(16), list(range(100, 116)))
    assert second.resident_tokens == 8
    assert second.last.parent is first.last
    path = forest.match(root, tokens_of(16)).path
    assert device_slots(path) == [*range(8), *range(108, 116)]


def test_diverging_splits_at_the_last_common_page(forest: Forest, root: Node) -> None:
    old = forest.insert(root, tokens_of(16), list(range(16))).last
    prompt = tokens_of(16)
    prompt[9] = -1  # inside the third page
    new = forest.insert(root, prompt, list(range(100, 116)))
    assert new.resident_tokens == 8
    assert new.last.parent is old.parent
    assert (old.start, old.end) == (8, 16)
    assert old.slots(DEVICE) == list(range(8, 16))
    assert new.last.slots(DEVICE) == list(range(108, 116))


def test_ending_inside_a_node_splits_it(forest: Forest, root: Node) -> None:
    forest.insert(root, tokens_of(16), list(range(16)))
    match = forest.match(root, tokens_of(9))
    assert match.n_tokens == 8
    assert match.last.end == 8
    result = forest.insert(root, tokens_of(4), list(range(100, 104)))
    assert (result.resident_tokens, result.last.end, result.adopted) == (4, 4, ())


def test_limit_caps_what_is_considered(forest: Forest, root: Node) -> None:
    forest.insert(root, tokens_of(16), list(range(8)), limit=10)
    assert forest.match(root, tokens_of(16)).n_tokens == 8
    assert forest.match(root, tokens_of(16), limit=7).n_tokens == 4
    assert forest.match(root, tokens_of(16), limit=0).n_tokens == 0


def test_the_callers_tokens_may_change_afterwards(forest: Forest, root: Node) -> None:
    growing = tokens_of(8)
    forest.insert(root, growing, list(range(8)))
    growing[0] = -7
    growing.extend(range(50))  # would fail if the forest still held a view
    assert forest.match(root, tokens_of(8)).n_tokens == 8
    forest.check_integrity(deep=True)


def test_a_node_the_host_alone_has_adopts_the_new_device_slots(forest: Forest, root: Node) -> None:
    first = forest.insert(root, tokens_of(8), list(range(8))).last
    second = forest.insert(root, tokens_of(16), list(range(16))).last
    for node, pages in ((first, [0, 1]), (second, [2, 3])):
        forest.set_resident(node, HOST, pages)
    assert forest.evict(second, DEVICE) == list(range(8, 16))
    result = forest.insert(root, tokens_of(16), list(range(100, 116)))
    assert result.resident_tokens == 8
    assert result.adopted == (second,)
    assert second.slots(DEVICE) == list(range(108, 116))
    assert second.slots(HOST) == [2, 3]


def test_pages_being_loaded_count_as_there(forest: Forest, root: Node) -> None:
    node = forest.insert(root, tokens_of(8), [0, 1], tier=HOST).last
    forest.start_transfer(node, DEVICE, Residency.LOADING, list(range(8)), 1)
    result = forest.insert(root, tokens_of(12), list(range(100, 112)))
    assert result.resident_tokens == 8
    assert result.last.slots(DEVICE) == list(range(108, 112))


def test_a_hole_in_a_tier_is_refused_and_nothing_adopted(forest: Forest, root: Node) -> None:
    forest.insert(root, tokens_of(4), list(range(4)))
    below = forest.insert(root, tokens_of(8), list(range(8))).last
    forest.set_resident(below, HOST, [1])
    with pytest.raises(IntegrityError, match="HOST"):
        forest.insert(root, tokens_of(8), [5, 6], tier=HOST)
    assert forest.resident_tokens(HOST) == 4
    forest.check_integrity()


@pytest.mark.parametrize("n_slots", [0, 1, 3, 7, 9, 16])
def test_slots_must_cover_the_pages(forest: Forest, root: Node, n_slots: int) -> None:
    with pytest.raises(IntegrityError, match="slots"):
        forest.insert(root, tokens_of(8), list(range(n_slots)))
    assert len(forest) == 0


def test_numpy_slots_are_sliced_not_copied(forest: Forest, root: Node) -> None:
    slots = np.arange(8)
    forest.insert(root, tokens_of(8), slots)
    part = forest.match(root, tokens_of(4)).last.slots(DEVICE)
    assert isinstance(part, np.ndarray)
    assert np.shares_memory(part, slots)


def test_matching_touches_the_path_and_only_it(forest: Forest, root: Node) -> None:
    shared = forest.insert(root, tokens_of(4), list(range(4))).last
    one = forest.insert(root, tokens_of(8), list(range(8))).last
    other = forest.insert(root, tokens_of(4) + tokens_of(4, 50), list(range(8))).last
    before = other.last_access
    forest.match(root, tokens_of(8))
    assert shared.last_access == one.last_access > before == other.last_access
    assert (shared.hits, one.hits, other.hits) == (1, 1, 0)


def test_a_peek_touches_and_splits_nothing(forest: Forest, root: Node) -> None:
    upper = forest.insert(root, tokens_of(4), list(range(4))).last
    lower = forest.insert(root, tokens_of(16), list(range(16))).last
    before = forest.view()
    found = forest.peek(root, tokens_of(10))
    assert (found.path, found.partial, found.common, found.end) == ([upper], lower, 4, 8)
    assert forest.peek(upper, tokens_of(10)) == ([], 4, lower, 4)
    assert forest.peek(root, tokens_of(30), limit=17).path == [upper, lower]
    assert forest.view() == before


def test_extend_makes_nodes_on_their_way(forest: Forest, root: Node) -> None:
    anchor = forest.insert(root, tokens_of(4), list(range(4))).last
    (node,) = forest.extend(anchor, tokens_of(8, 4), HOST, Residency.LOADING, [7, 8], op=5)
    assert node.parent is anchor
    assert (node.state(HOST), node.slots(HOST), node.op(HOST)) == (Residency.LOADING, [7, 8], 5)
    assert node.page_hashes == page_hashes(ROOT_HASH, tokens_of(12), 4)[1:]
    assert node.last_access == anchor.last_access
    assert forest.nodes_of(5) == [node]


def test_extend_uses_nodes_that_lack_the_tier(forest: Forest, root: Node) -> None:
    known = forest.insert(root, tokens_of(8), list(range(8))).last
    nodes = forest.extend(root, tokens_of(12), HOST, Residency.LOADING, [1, 2, 3], op=5)
    assert nodes[0] is known
    assert [node.slots(HOST) for node in nodes] == [[1, 2], [3]]
    with pytest.raises(IntegrityError, match="already LOADING"):
        forest.extend(root, tokens_of(12), HOST, Residency.LOADING, [4, 5, 6], op=6)
    assert forest.nodes_of(6) == []


@pytest.mark.parametrize("n_tokens", [0, 3, 5])
def test_extend_wants_whole_pages(forest: Forest, root: Node, n_tokens: int) -> None:
    with pytest.raises(IntegrityError, match="whole pages"):
        forest.extend(root, tokens_of(n_tokens), DISK, Residency.LOADING, None, 1)


def test_split_keeps_the_lower_half_the_same_object(forest: Forest, root: Node) -> None:
    node = forest.insert(root, tokens_of(12), list(range(12))).last
    child = forest.insert(root, tokens_of(16), list(range(16))).last
    forest.start_transfer(node, HOST, Residency.WRITING_BACK, [7, 8, 9], op=3)
    forest.pin(child, DEVICE)
    upper, lower = forest.split(node, 1)
    assert lower is node is child.parent
    assert upper.parent is root
    assert (upper.start, upper.end, lower.start, lower.end) == (0, 4, 4, 12)
    assert (upper.slots(HOST), lower.slots(HOST)) == ([7], [8, 9])
    assert upper.pins(DEVICE) == lower.pins(DEVICE) == 1
    assert upper.last_access == lower.last_access
    assert forest.nodes_of(3) == [upper, lower]
    forest.check_integrity(deep=True)


@pytest.mark.parametrize("n_pages", [-1, 0, 3, 4])
def test_split_leaves_no_empty_half(forest: Forest, root: Node, n_pages: int) -> None:
    node = forest.insert(root, tokens_of(12), list(range(12))).last
    with pytest.raises(IntegrityError, match="no cut"):
        forest.split(node, n_pages)


def test_a_root_is_kept_by_its_nodes_or_its_holder_only(forest: Forest) -> None:
    for i in range(100):
        forest.root(namespace_hash("tenant", i))
    gc.collect()
    assert forest.roots() == []
    last = forest.insert(forest.root(ROOT_HASH), tokens_of(4), list(range(4))).last
    assert [root.root_hash for root in forest.roots()] == [ROOT_HASH]
    forest.evict(last, DEVICE)
    assert forest.roots() == []


def test_a_namespace_hash_has_32_bytes(forest: Forest) -> None:
    with pytest.raises(IntegrityError, match="32"):
        forest.root(b"short")


def test_clear_drops_all_but_roots(forest: Forest, root: Node) -> None:
    node = forest.insert(root, tokens_of(8), list(range(8))).last
    forest.pin(node, DEVICE)
    forest.start_transfer(node, HOST, Residency.WRITING_BACK, [1, 2], op=9)
    forest.clear()
    assert len(forest) == 0
    assert node not in forest
    assert forest.root(ROOT_HASH) is root
    assert forest.evictable_tokens(DEVICE) == forest.protected_tokens(DEVICE) == 0
    assert forest.finish_transfer(9, HOST) == []  # a completion that comes late
    forest.unpin(node, DEVICE)  # so does a request's release
    assert forest.match(root, tokens_of(8)).n_tokens == 0
    forest.check_integrity()


def test_a_node_is_found_by_id_until_it_leaves(forest: Forest, root: Node) -> None:
    node = forest.insert(root, tokens_of(8), list(range(8))).last
    assert forest.node(node.node_id) is forest.find(node.node_id) is node
    forest.evict(node, DEVICE)
    assert forest.find(node.node_id) is None
    with pytest.raises(IntegrityError, match="not in the forest"):
        forest.node(node.node_id)
    with pytest.raises(IntegrityError, match="not in the forest"):
        forest.pin(node, DEVICE)


@pytest.mark.parametrize("page_size", [1, 16])
def test_a_path_of_thousands_of_nodes_needs_no_recursion(page_size: int) -> None:
    forest = Forest(page_size)
    root = forest.root(ROOT_HASH)
    n_nodes = 5000
    tokens = tokens_of(n_nodes * page_size)
    parent = root
    for i in range(n_nodes):
        page = tokens[i * page_size : (i + 1) * page_size]
        (parent,) = forest.extend(parent, page, HOST, Residency.LOADING, [i], op=1)
    last = parent
    forest.finish_transfer(1, HOST)
    assert len(forest.match(root, tokens).path) == n_nodes
    forest.pin(last, HOST)
    forest.check_integrity()
    forest.unpin(last, HOST)
    for node in forest.match(root, tokens).path:
        forest.start_transfer(node, DEVICE, Residency.LOADING, [0], op=2)
    assert len(forest.abort_transfer(2, DEVICE)) == n_nodes
    while forest.leaves(HOST):
        forest.evict(next(iter(forest.leaves(HOST))), HOST)
    assert len(forest) == 0
