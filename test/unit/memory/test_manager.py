"""The memory manager, decision by decision, read off the actions that it returns."""

from __future__ import annotations

from array import array
from typing import Any

import pytest

from tiered_kv.core.config import MemoryConfig
from tiered_kv.core.errors import ConfigError
from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.key import namespace_hash
from tiered_kv.forest.node import Node
from tiered_kv.forest.residency import Residency
from tiered_kv.memory.actions import Drop, Load, WriteBack
from tiered_kv.memory.manager import PATIENCE_S, MemoryManager

DEVICE, HOST, DISK = Tier.DEVICE, Tier.HOST, Tier.DISK
PROMPT = array("q", range(12))


@pytest.fixture
def forest() -> Forest:
    return Forest(4)


@pytest.fixture
def root(forest: Forest) -> Node:
    return forest.root(namespace_hash("model"))


@pytest.fixture
def path(forest: Forest, root: Node) -> list[Node]:
    """Three nodes of one page each, one below the other, RESIDENT on the device."""
    return [forest.insert(root, PROMPT[:n], list(range(n))).last for n in (4, 8, 12)]


def carry_out(forest: Forest, drops: list[Drop]) -> list[int]:
    """Evicts as told; returns the tokens of each drop."""
    freed = []
    for drop in drops:
        node = forest.node(drop.node_id)
        freed.append(node.n_tokens)
        forest.evict(node, drop.tier)
    return freed


# -- write-through ----------------------------------------------------------------------------


def test_new_device_nodes_are_written_to_the_host(forest: Forest, path: list[Node]) -> None:
    manager = MemoryManager(forest, MemoryConfig())
    forest.set_resident(path[0], HOST, [0])
    forest.start_transfer(path[1], HOST, Residency.WRITING_BACK, [1], 1)
    assert manager.on_insert(path) == [WriteBack(path[2].node_id, DEVICE, HOST)]


def test_new_host_nodes_are_written_to_disk(forest: Forest, path: list[Node]) -> None:
    manager = MemoryManager(forest, MemoryConfig())
    forest.set_resident(path[0], HOST, [0])
    forest.set_resident(path[0], DISK)
    forest.set_resident(path[1], HOST, [1])
    # path[2] isn't on the host: there is nothing to write from
    assert manager.on_host_resident(path, DISK) == [WriteBack(path[1].node_id, HOST, DISK)]


@pytest.mark.parametrize(
    ("config", "to_host", "to_disk"),
    [
        (MemoryConfig(), True, True),
        (MemoryConfig(disk_enabled=False), True, False),
        (MemoryConfig(host_enabled=False, disk_enabled=False), False, False),
    ],
)
def test_nothing_is_sent_to_a_tier_that_is_off(
    forest: Forest, path: list[Node], config: MemoryConfig, to_host: bool, to_disk: bool
) -> None:
    manager = MemoryManager(forest, config)
    assert bool(manager.on_insert(path)) is to_host
    forest.set_resident(path[0], HOST, [0])
    assert bool(manager.on_host_resident(path, DISK)) is to_disk


# -- loads ------------------------------------------------------------------------------------


def test_what_the_host_has_below_the_device_is_loaded(
    forest: Forest, root: Node, path: list[Node]
) -> None:
    manager = MemoryManager(forest, MemoryConfig())
    for page, node in enumerate(path):
        forest.set_resident(node, HOST, [page])
    assert manager.on_match(forest.match(root, PROMPT)) is None
    forest.evict(path[2], DEVICE)
    forest.evict(path[1], DEVICE)
    ids = (path[1].node_id, path[2].node_id)
    assert manager.on_match(forest.match(root, PROMPT)) == Load(ids, HOST, DEVICE)
    forest.start_transfer(path[1], DEVICE, Residency.LOADING, [0], 1)
    assert manager.on_match(forest.match(root, PROMPT)) == Load(ids[1:], HOST, DEVICE)


def test_a_load_ends_where_the_host_has_a_hole(
    forest: Forest, root: Node, path: list[Node]
) -> None:
    manager = MemoryManager(forest, MemoryConfig())
    for page in (0, 2):
        forest.set_resident(path[page], HOST, [page])
    for node in (path[2], path[1], path[0]):
        forest.evict(node, DEVICE)
    load = manager.on_match(forest.match(root, PROMPT))
    assert load == Load((path[0].node_id,), HOST, DEVICE)


def test_what_is_still_coming_to_the_host_is_not_loaded(forest: Forest, root: Node) -> None:
    manager = MemoryManager(forest, MemoryConfig())
    forest.extend(root, PROMPT, HOST, Residency.LOADING, [0, 1, 2], op=1)
    assert manager.on_match(forest.match(root, PROMPT)) is None
    forest.finish_transfer(1, HOST)
    assert manager.on_match(forest.match(root, PROMPT)) is not None


# -- pressure ---------------------------------------------------------------------------------


def test_drops_go_up_a_path_in_legal_order(forest: Forest, path: list[Node]) -> None:
    manager = MemoryManager(forest, MemoryConfig())
    drops = manager.on_pressure(DEVICE, 2)
    assert drops == [Drop(path[2].node_id, DEVICE), Drop(path[1].node_id, DEVICE)]
    assert carry_out(forest, drops) == [4, 4]
    assert forest.resident_tokens(DEVICE) == 4


def test_no_more_is_dropped_than_needed(forest: Forest, root: Node) -> None:
    manager = MemoryManager(forest, MemoryConfig())
    prompt = array("q", range(40))
    forest.insert(root, prompt, list(range(40)))
    drops = manager.on_pressure(DEVICE, 3)
    assert carry_out(forest, drops) == [12]
    assert forest.match(root, prompt).n_tokens == 28  # the tail went, the prefix stays


def test_asking_changes_nothing_but_splits(forest: Forest, path: list[Node]) -> None:
    manager = MemoryManager(forest, MemoryConfig())
    before = forest.view()
    drops = manager.on_pressure(DEVICE, 2)
    assert forest.view() == before
    assert manager.on_pressure(DEVICE, 2) == drops


@pytest.mark.parametrize("n_pages", [0, -3])
def test_no_pressure_drops_nothing(forest: Forest, path: list[Node], n_pages: int) -> None:
    assert MemoryManager(forest, MemoryConfig()).on_pressure(DEVICE, n_pages) == []


def test_what_is_pinned_stays_and_the_rest_goes(forest: Forest, path: list[Node]) -> None:
    manager = MemoryManager(forest, MemoryConfig())
    forest.pin(path[1], DEVICE)
    assert manager.on_pressure(DEVICE, 100) == [Drop(path[2].node_id, DEVICE)]
    assert manager.on_pressure(HOST, 100) == []


def test_tiers_are_under_pressure_separately(forest: Forest, path: list[Node]) -> None:
    manager = MemoryManager(forest, MemoryConfig())
    for page, node in enumerate(path):
        forest.set_resident(node, HOST, [page])
    forest.pin(path[2], DEVICE)
    drops = manager.on_pressure(HOST, 3)
    assert drops == [Drop(node.node_id, HOST) for node in reversed(path)]
    carry_out(forest, drops)
    assert forest.resident_tokens(DEVICE) == 12
    forest.check_integrity()


def test_an_unknown_policy_is_refused_by_name(forest: Forest) -> None:
    with pytest.raises(ConfigError, match=r"no eviction policy 'mru'; the known ones are: lru"):
        MemoryManager(forest, MemoryConfig(eviction_policy="mru"))


# -- costs ------------------------------------------------------------------------------------


class SlowDisk:
    """A token takes a second to compute; a byte, of which it has one, as long as told to load."""

    def bytes_per_token(self, tier: Tier) -> float:
        return 1.0

    def __init__(self, byte_s: float) -> None:
        self.byte_s = byte_s

    def recompute_s(self, start: int, end: int) -> float:
        return float(end - start)

    def load_s(self, source: Tier, target: Tier, n_bytes: int, queued_bytes: int = 0) -> float:
        return (n_bytes + queued_bytes) * self.byte_s


def test_an_unknown_load_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match="cost, always, never, not 'sometimes'"):
        MemoryConfig(load_policy="sometimes")


@pytest.mark.parametrize(("byte_s", "n_pages"), [(0.5, 3), (2.0, 0)])
def test_the_disk_is_read_if_that_is_sooner(forest: Forest, byte_s: float, n_pages: int) -> None:
    manager = MemoryManager(forest, MemoryConfig(), SlowDisk(byte_s))
    assert manager.pages_from(DISK, 3, 0, 12) == n_pages


def test_what_is_queued_before_it_may_make_it_later(forest: Forest) -> None:
    manager = MemoryManager(forest, MemoryConfig(), SlowDisk(0.5))
    assert manager.pages_from(DISK, 3, 0, 12, queued_bytes=8) == 3
    assert manager.pages_from(DISK, 3, 0, 12, queued_bytes=20) == 0


def test_what_is_read_while_a_request_waits_anyway_is_free(forest: Forest) -> None:
    manager = MemoryManager(forest, MemoryConfig(), SlowDisk(2.0))
    assert manager.pages_from(DISK, 3, 0, 12, wait_s=17.0) == 2


@pytest.mark.parametrize(("policy", "n_pages"), [("always", 3), ("never", 0)])
def test_a_policy_may_disregard_costs(forest: Forest, policy: str, n_pages: int) -> None:
    manager = MemoryManager(forest, MemoryConfig(load_policy=policy), SlowDisk(100.0))
    assert manager.pages_from(DISK, 3, 0, 12) == n_pages


def test_patience_is_what_computing_takes_or_twice_what_reading_takes(forest: Forest) -> None:
    config = MemoryConfig()
    manager = MemoryManager(forest, config, SlowDisk(0.1))
    assert manager.patience_s(3, 0, manager.read_s(DISK, 3)) == 12.0
    assert manager.patience_s(3, 0, manager.read_s(DISK, 3, queued_bytes=100)) > 20.0
    assert MemoryManager(forest, config).patience_s(3, 0, 1.0) == PATIENCE_S


def test_a_load_ends_at_a_page_in_the_middle_of_a_node(forest: Forest, root: Node) -> None:
    """Computing takes 12, loading 16: after 2 of 3 pages, both are nearest to each other."""
    node = forest.insert(root, PROMPT, list(range(12)), tier=HOST).last
    manager = MemoryManager(forest, MemoryConfig(), SlowDisk(4 / 3))
    load = manager.on_match(forest.match(root, PROMPT), prompt_tokens=16)
    assert load is not None
    (loaded,) = load.node_ids
    assert (forest.node(loaded).n_pages, node.n_pages) == (2, 1)
    assert forest.node(loaded).state(HOST) is Residency.RESIDENT


def test_what_was_used_more_and_lies_deeper_is_written_first(forest: Forest, root: Node) -> None:
    class Deep(SlowDisk):
        def recompute_s(self, start: int, end: int) -> float:
            return float(end * end - start * start)

    manager = MemoryManager(forest, MemoryConfig(), Deep(1.0))
    shallow, _, deep = (
        forest.insert(root, PROMPT, list(range(n)), limit=n).last for n in (4, 8, 12)
    )
    assert manager.write_value(deep) > manager.write_value(shallow)
    before = manager.write_value(shallow)
    forest.match(root, PROMPT[:4])
    assert manager.write_value(shallow) > before


# -- all of a run or nothing ------------------------------------------------------------------


class _SecondsPerToken:
    """A tenth of a second for a loaded token of 1 byte, and `compute_s` for a computed one."""

    def __init__(self, compute_s: float) -> None:
        self._compute_s = compute_s

    def bytes_per_token(self, tier: Tier) -> float:
        return 1.0

    def load_s(self, source: Tier, target: Tier, n_bytes: int, queued_bytes: int = 0) -> float:
        return 0.1 * (n_bytes + queued_bytes)

    def recompute_s(self, start: int, end: int) -> float:
        return self._compute_s * (end - start)


@pytest.mark.parametrize(
    ("policy", "compute_s", "queued_bytes", "is_loaded"),
    [
        ("always", 0.001, 10**6, True),
        ("never", 1000.0, 0, False),
        ("cost", 0.2, 0, True),
        ("cost", 0.05, 0, False),
        ("cost", 0.2, 100, False),
    ],
)
def test_a_run_is_loaded_whole_or_not_at_all(
    forest: Forest,
    root: Node,
    path: list[Node],
    policy: str,
    compute_s: float,
    queued_bytes: int,
    is_loaded: bool,
) -> None:
    for node in path[:0:-1]:
        forest.set_resident(node, HOST, list(range(node.n_pages)))
        forest.evict(node, DEVICE)
    costs: Any = _SecondsPerToken(compute_s)
    manager = MemoryManager(forest, MemoryConfig(load_policy=policy), costs)
    match = forest.match(root, PROMPT)
    # Its state on the device is that at the very beginning: all of it would be computed.
    action = manager.on_whole_match(
        match, start=0, prompt_tokens=len(PROMPT), queued_bytes=queued_bytes
    )
    whole = Load((path[1].node_id, path[2].node_id), HOST, DEVICE)
    assert action == (whole if is_loaded else None)
