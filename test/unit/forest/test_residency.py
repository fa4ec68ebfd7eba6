"""Residency, eviction, transfers and pins: every step that is allowed, and every one that isn't."""

from __future__ import annotations

import itertools
from array import array

import pytest

from tiered_kv.core.errors import IntegrityError
from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.key import namespace_hash
from tiered_kv.forest.node import Node
from tiered_kv.forest.residency import Residency, check_transition

DEVICE, HOST, DISK = Tier.DEVICE, Tier.HOST, Tier.DISK
ABSENT, LOADING = Residency.ABSENT, Residency.LOADING
RESIDENT, WRITING_BACK = Residency.RESIDENT, Residency.WRITING_BACK


@pytest.fixture
def forest() -> Forest:
    return Forest(4)


@pytest.fixture
def path(forest: Forest) -> list[Node]:
    """Three nodes of one page each, one below the other, RESIDENT on the device."""
    root = forest.root(namespace_hash("model"))
    tokens = array("q", range(12))
    return [forest.insert(root, tokens[:n], list(range(n))).last for n in (4, 8, 12)]


def test_the_state_machine_is_the_documented_one() -> None:
    allowed = {
        (ABSENT, LOADING),
        (ABSENT, WRITING_BACK),
        (ABSENT, RESIDENT),
        (LOADING, RESIDENT),
        (LOADING, ABSENT),
        (WRITING_BACK, RESIDENT),
        (WRITING_BACK, ABSENT),
        (RESIDENT, ABSENT),
    }
    for old, new in itertools.product(Residency, repeat=2):
        if (old, new) in allowed:
            check_transition(old, new)
        else:
            with pytest.raises(IntegrityError, match=f"{old.name} to {new.name}"):
                check_transition(old, new)


# -- brought ahead ----------------------------------------------------------------------------


def test_what_was_brought_ahead_counts_for_whoever_runs_on_it_first(
    forest: Forest, path: list[Node]
) -> None:
    top, _, bottom = path
    below = forest.insert(forest.root(namespace_hash("model")), array("q", range(20)), range(20))
    for node in (bottom, below.last):
        forest.mark_ahead(node, DEVICE)
    upper, lower = forest.split(below.last, 1)
    assert forest.take_ahead(top, DEVICE) == 0
    assert forest.take_ahead(upper, DEVICE) == 8
    assert forest.take_ahead(upper, DEVICE) == 0
    assert forest.take_ahead(lower, DEVICE) == 4


def test_what_was_brought_ahead_in_vain_is_not_ahead_when_it_is_back(
    forest: Forest, path: list[Node]
) -> None:
    bottom = path[-1]
    forest.set_resident(bottom, HOST, [0])
    forest.mark_ahead(bottom, DEVICE)
    forest.evict(bottom, DEVICE)
    forest.set_resident(bottom, DEVICE, [0])
    assert forest.take_ahead(bottom, DEVICE) == 0


# -- eviction ---------------------------------------------------------------------------------


def test_only_leaves_may_be_evicted_and_parents_follow(forest: Forest, path: list[Node]) -> None:
    top, middle, bottom = path
    assert list(forest.leaves(DEVICE)) == [bottom]
    with pytest.raises(IntegrityError, match="children"):
        forest.evict(middle, DEVICE)
    assert forest.evict(bottom, DEVICE) == [8, 9, 10, 11]
    assert list(forest.leaves(DEVICE)) == [middle]
    forest.evict(middle, DEVICE)
    forest.evict(top, DEVICE)
    assert len(forest) == 0
    assert forest.resident_tokens(DEVICE) == 0


def test_a_node_stays_while_host_has_it_and_goes_with_its_last_copy(
    forest: Forest, path: list[Node]
) -> None:
    bottom = path[-1]
    forest.set_resident(bottom, HOST, [2])
    forest.set_resident(bottom, DISK)
    forest.evict(bottom, DEVICE)
    assert bottom in forest
    assert forest.evict(bottom, HOST) == [2]
    assert bottom not in forest  # disk alone is found again by hash
    assert forest.resident_tokens(DISK) == 0
    forest.check_integrity()


def test_forgetting_a_node_forgets_ancestors_nothing_needs(
    forest: Forest, path: list[Node]
) -> None:
    bottom = path[-1]
    forest.set_resident(bottom, HOST, [2])
    for node in reversed(path):
        forest.evict(node, DEVICE)
    assert len(forest) == 3  # a hole above what the host has
    forest.evict(bottom, HOST)
    assert len(forest) == 0


def test_disk_may_go_from_under_children(forest: Forest, path: list[Node]) -> None:
    for node in path:
        forest.set_resident(node, DISK)
    assert forest.evict(path[0], DISK) is None
    assert list(forest.leaves(DISK)) == [path[-1]]
    forest.check_integrity()


def test_what_is_not_resident_cannot_be_evicted(forest: Forest, path: list[Node]) -> None:
    with pytest.raises(IntegrityError, match="ABSENT in HOST"):
        forest.evict(path[-1], HOST)
    forest.start_transfer(path[-1], HOST, WRITING_BACK, [0], 1)
    with pytest.raises(IntegrityError, match="WRITING_BACK in HOST"):
        forest.evict(path[-1], HOST)


# -- the device is prefix-closed --------------------------------------------------------------


def test_nothing_comes_to_the_device_below_a_hole(forest: Forest, path: list[Node]) -> None:
    _, middle, bottom = path
    for node in (bottom, middle):
        forest.set_resident(node, HOST, [0])
        forest.evict(node, DEVICE)
    with pytest.raises(IntegrityError, match="not in DEVICE"):
        forest.start_transfer(bottom, DEVICE, LOADING, [0], 1)
    with pytest.raises(IntegrityError, match="not in DEVICE"):
        forest.set_resident(bottom, DEVICE, [0])
    with pytest.raises(IntegrityError, match="not in DEVICE"):
        forest.extend(bottom, array("q", range(4)), DEVICE, LOADING, [0], 1)
    forest.start_transfer(middle, DEVICE, LOADING, [0], 1)
    forest.start_transfer(bottom, DEVICE, LOADING, [0], 1)
    forest.check_integrity()


def test_a_load_that_others_built_on_cannot_be_aborted(forest: Forest, path: list[Node]) -> None:
    top, middle, bottom = path
    for node in (bottom, middle):
        forest.set_resident(node, HOST, [0])
        forest.evict(node, DEVICE)
    forest.start_transfer(middle, DEVICE, LOADING, [0], 1)
    forest.insert(forest.roots()[0], array("q", range(12)), list(range(12)))
    with pytest.raises(IntegrityError, match=f"node {bottom.node_id} builds"):
        forest.abort_transfer(1, DEVICE)
    assert middle.state(DEVICE) is LOADING
    assert forest.finish_transfer(1, DEVICE) == [middle]
    assert top.state(DEVICE) is RESIDENT


def test_disk_takes_no_slots(forest: Forest, path: list[Node]) -> None:
    with pytest.raises(IntegrityError, match="no slots"):
        forest.set_resident(path[0], DISK, [0])
    with pytest.raises(IntegrityError, match="no slots"):
        forest.start_transfer(path[0], DISK, WRITING_BACK, [0], 1)
    assert path[0].state(DISK) is ABSENT


# -- transfers --------------------------------------------------------------------------------


def test_a_transfer_moves_its_nodes_and_gives_slots_back_if_it_fails(
    forest: Forest, path: list[Node]
) -> None:
    for page, node in enumerate(path):
        forest.start_transfer(node, HOST, WRITING_BACK, [page], 7)
    assert forest.protected_tokens(HOST) == 12
    assert forest.finish_transfer(7, HOST) == path
    assert all(node.state(HOST) is RESIDENT and node.op(HOST) is None for node in path)
    assert forest.evictable_tokens(HOST) == 12
    assert forest.nodes_of(7) == []

    for node in path:
        forest.start_transfer(node, DISK, WRITING_BACK, None, 8)
    assert forest.abort_transfer(8, DISK) == [(node, None) for node in path]
    assert forest.resident_tokens(DISK) == 0


def test_aborting_returns_slots_top_down_and_forgets_new_nodes(forest: Forest) -> None:
    root = forest.root(namespace_hash("model"))
    forest.extend(root, array("q", range(12)), HOST, LOADING, [5, 6, 7], 1)
    forest.match(root, array("q", range(4)))  # splits it under way
    freed = forest.abort_transfer(1, HOST)
    assert [slots for _, slots in freed] == [[5], [6, 7]]
    assert len(forest) == 0


def test_leading_pages_may_arrive_alone(forest: Forest) -> None:
    root = forest.root(namespace_hash("model"))
    tokens = array("q", range(16))
    forest.extend(root, tokens, HOST, LOADING, [5, 6, 7, 8], 1)
    forest.match(root, tokens[:4])
    came, freed = forest.finish_leading(1, HOST, 3)
    assert [node.slots(HOST) for node in came] == [[5], [6, 7]]
    assert [slots for _, slots in freed] == [[8]]
    assert forest.match(root, tokens).n_tokens == 12
    assert forest.nodes_of(1) == []
    forest.check_integrity(deep=True)


@pytest.mark.parametrize(("n_pages", "n_came"), [(0, 0), (4, 4), (9, 4)])
def test_leading_pages_may_be_none_or_all(forest: Forest, n_pages: int, n_came: int) -> None:
    root = forest.root(namespace_hash("model"))
    forest.extend(root, array("q", range(16)), HOST, LOADING, [5, 6, 7, 8], 1)
    came, freed = forest.finish_leading(1, HOST, n_pages)
    assert sum(node.n_pages for node in came) == n_came
    assert sum(len(slots) for _, slots in freed if slots is not None) == 4 - n_came
    assert forest.resident_tokens(HOST) == 4 * n_came


def test_a_transfer_starts_once_and_in_a_transfer_state(forest: Forest, path: list[Node]) -> None:
    with pytest.raises(IntegrityError, match="not RESIDENT"):
        forest.start_transfer(path[0], HOST, RESIDENT, [0], 1)
    forest.start_transfer(path[0], HOST, WRITING_BACK, [0], 1)
    with pytest.raises(IntegrityError, match="already WRITING_BACK"):
        forest.start_transfer(path[0], HOST, WRITING_BACK, [1], 2)
    with pytest.raises(IntegrityError, match="already WRITING_BACK"):
        forest.set_resident(path[0], HOST, [1])
    assert path[0].slots(HOST) == [0]
    assert forest.nodes_of(2) == []


def test_a_transfer_keeps_its_node_in_memory(forest: Forest, path: list[Node]) -> None:
    bottom = path[-1]
    forest.start_transfer(bottom, DISK, WRITING_BACK, None, 1)
    forest.evict(bottom, DEVICE)
    assert bottom in forest
    assert forest.finish_transfer(1, DISK) == [bottom]
    assert bottom not in forest


# -- pins -------------------------------------------------------------------------------------


def test_a_pin_protects_the_whole_path_in_its_tier(forest: Forest, path: list[Node]) -> None:
    top, middle, bottom = path
    for page, node in enumerate(path):
        forest.set_resident(node, HOST, [page])
    forest.pin(middle, DEVICE)
    assert [node.pins(DEVICE) for node in path] == [1, 1, 0]
    assert (forest.evictable_tokens(DEVICE), forest.protected_tokens(DEVICE)) == (4, 8)
    assert (forest.evictable_tokens(HOST), forest.protected_tokens(HOST)) == (12, 0)
    forest.evict(bottom, DEVICE)
    with pytest.raises(IntegrityError, match="pins"):
        forest.evict(middle, DEVICE)
    forest.evict(bottom, HOST)
    forest.evict(middle, HOST)
    forest.unpin(middle, DEVICE)
    assert list(forest.leaves(DEVICE)) == [middle]
    assert top.pins(DEVICE) == 0


def test_pins_add_up(forest: Forest, path: list[Node]) -> None:
    top, _, bottom = path
    forest.pin(bottom, DEVICE)
    forest.pin(top, DEVICE)
    forest.unpin(bottom, DEVICE)
    assert [node.pins(DEVICE) for node in path] == [1, 0, 0]
    assert forest.protected_tokens(DEVICE) == 4


def test_a_pin_keeps_a_node_that_no_tier_holds(forest: Forest) -> None:
    root = forest.root(namespace_hash("model"))
    (node,) = forest.extend(root, array("q", range(4)), HOST, LOADING, [0], 1)
    forest.pin(node, HOST)
    forest.abort_transfer(1, HOST)
    assert node in forest
    assert forest.protected_tokens(HOST) == 0  # it holds no slots
    forest.unpin(node, HOST)
    assert node not in forest


def test_a_pin_of_a_split_node_still_holds_the_path(forest: Forest) -> None:
    root = forest.root(namespace_hash("model"))
    tokens = array("q", range(12))
    node = forest.insert(root, tokens, list(range(12))).last
    forest.pin(node, DEVICE)
    upper = forest.match(root, tokens[:4]).last
    assert forest.protected_tokens(DEVICE) == 12
    forest.unpin(node, DEVICE)
    assert upper.pins(DEVICE) == 0
    assert forest.evictable_tokens(DEVICE) == 12


def test_unpinning_once_too_often_is_refused(forest: Forest, path: list[Node]) -> None:
    with pytest.raises(IntegrityError, match="no pin"):
        forest.unpin(path[0], DEVICE)
    forest.pin(path[0], DEVICE)
    forest.unpin(path[0], DEVICE)
    with pytest.raises(IntegrityError, match="no pin"):
        forest.unpin(path[0], DEVICE)
    forest.check_integrity()


def test_roots_take_no_pins(forest: Forest, path: list[Node]) -> None:
    root = forest.roots()[0]
    forest.pin(root, DEVICE)
    assert root.pins(DEVICE) == 0
    forest.unpin(root, DEVICE)


# -- leaves in order --------------------------------------------------------------------------


def test_new_leaves_are_told_apart_from_those_seen(forest: Forest, path: list[Node]) -> None:
    top, middle, bottom = path
    seen = forest.leaf_sequence(DEVICE)
    assert list(forest.leaves_after(DEVICE, seen)) == []
    assert list(forest.leaves_after(DEVICE, 0)) == [bottom]
    forest.pin(bottom, DEVICE)
    forest.unpin(bottom, DEVICE)
    assert list(forest.leaves_after(DEVICE, seen)) == [bottom]
    seen = forest.leaf_sequence(DEVICE)
    forest.evict(bottom, DEVICE)
    other = forest.insert(forest.roots()[0], array("q", range(90, 94)), list(range(4))).last
    assert list(forest.leaves_after(DEVICE, seen)) == [other, middle]
    assert top not in forest.leaves(DEVICE)
