"""What is written next: as decisions alone, over a forest and pages that nobody copies."""

from __future__ import annotations

from array import array

import pytest

from tiered_kv.core.config import MemoryConfig
from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.key import namespace_hash
from tiered_kv.forest.node import Node
from tiered_kv.forest.residency import Residency
from tiered_kv.memory import write_through
from tiered_kv.memory.manager import MemoryManager
from tiered_kv.memory.write_through import HostWrites, StoreWrites

DEVICE, HOST, DISK = Tier.DEVICE, Tier.HOST, Tier.DISK


class Tree:
    """Pages of one token; `n_host` of them on the host at most."""

    def __init__(self, n_host: int = 16) -> None:
        self.forest = Forest(1)
        self.root = self.forest.root(namespace_hash("test"))
        self.manager = MemoryManager(self.forest, MemoryConfig())
        self.to_host = HostWrites(self.forest, self.manager, n_host, [DISK])
        self.to_disk = StoreWrites(self.forest, self.manager, DISK, n_host, 0.5)

    def computed(self, *pages: int) -> Node:
        result = self.forest.insert(self.root, array("q", pages), range(len(pages)))
        self.to_host.offer(result.adopted or (result.last,))
        return result.last

    def begin(self, node: Node, tier: Tier, op: int) -> None:
        slots = range(node.n_pages) if tier is HOST else None
        self.forest.start_transfer(node, tier, Residency.WRITING_BACK, slots, op)

    def write(self, n: int = 1000) -> list[tuple[int, int]]:
        """Begins so many host writes, and ends them; returns what they covered."""
        written = []
        for op, write in enumerate(self.to_host.due()):
            if op == n:
                break
            written.append((write.node.start, write.node.end))
            self.begin(write.node, HOST, op + 1)
            self.forest.finish_transfer(op + 1, HOST)
        return written


def test_a_node_is_due_once_with_what_is_above_it_and_the_host_lacks() -> None:
    tree = Tree()
    tree.computed(1, 2, 3, 4)
    tree.computed(1, 2, 8)  # splits it: the upper half does not wait by itself
    assert tree.write() == [(0, 2), (2, 4), (2, 3)]
    assert len(tree.to_host.waiting) == 0
    tree.computed(1, 2, 3, 4)
    assert len(tree.to_host.waiting) == 0, "the host has it"


def test_what_is_large_is_written_in_parts_and_what_finds_no_room_waits() -> None:
    tree = Tree(n_host=16)
    tree.computed(*range(1, 11))
    assert tree.write(2) == [(0, 4), (4, 8)]
    tree.to_host.found_no_room(0, is_written_on=True)
    assert len(tree.to_host.waiting) == 1
    assert tree.write() == [(8, 10)]


def test_what_would_fill_the_pool_alone_is_given_up_if_nothing_can_make_room() -> None:
    tree = Tree(n_host=16)
    tree.computed(*range(1, 11))
    assert next(tree.to_host.due()).node.end == 4
    tree.to_host.found_no_room(15, is_written_on=False)
    assert len(tree.to_host.waiting) == 1, "a page is in use, and will be free"
    assert next(tree.to_host.due()).node.end == 4
    tree.to_host.found_no_room(16, is_written_on=True)
    assert len(tree.to_host.waiting) == 1, "a store makes room"
    assert next(tree.to_host.due()).node.end == 4
    tree.to_host.found_no_room(16, is_written_on=False)
    assert len(tree.to_host.waiting) == 0


def test_of_a_prompt_larger_than_the_pool_the_head_is_kept_and_what_a_store_has_is_not() -> None:
    tree = Tree(n_host=8)
    tree.computed(*range(1, 21))
    kept = []
    for op, write in enumerate(tree.to_host.due()):
        kept.append((write.node.start, write.keep.end))
        tree.begin(write.node, HOST, op + 1)
        tree.forest.finish_transfer(op + 1, HOST)
        tree.forest.set_resident(write.node, DISK)
    assert [start for start, _ in kept] == list(range(0, 20, 2))
    assert {keep for start, keep in kept if start > 6} == {4}
    for node in sorted(tree.forest.nodes(), key=lambda node: -node.end):
        if node.end > 4:
            tree.forest.evict(node, HOST)
    tree.computed(*range(1, 21))
    assert list(tree.to_host.due()) == [], "the disk has the rest"


def test_the_parent_waits_when_the_lower_half_is_evicted() -> None:
    tree = Tree()
    last = tree.computed(1, 2, 3, 4)
    upper, lower = tree.forest.split(last, 2)
    tree.forest.evict(lower, DEVICE)
    tree.to_host.evicted(lower, upper, HOST)
    assert tree.to_host.clear() == 0, "it is not that tier that it waits in"
    tree.computed(1, 2, 3, 4)
    upper, lower = (node for node in sorted(tree.forest.nodes(), key=lambda node: node.end))
    tree.forest.evict(lower, DEVICE)
    tree.to_host.evicted(lower, upper, DEVICE)
    assert tree.write() == [(0, 2)]


def test_a_failed_copy_takes_those_below_out_and_leaves_the_others() -> None:
    tree = Tree()
    above = tree.computed(1, 2)
    tree.computed(1, 2, 3)
    other = tree.computed(7, 8)
    tree.to_host.failed(above)
    assert [write.node for write in tree.to_host.due()] == [other]


def test_the_list_is_bounded_and_counts_what_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_through, "MAX_DEFERRED", 3)
    tree = Tree()
    for n in range(10):
        tree.computed(10 * n, 10 * n + 1)
    assert len(tree.to_host.waiting) == 3
    assert tree.to_host.clear() == 6
    assert not tree.to_host.waiting


def test_writes_to_a_store_hold_their_share_of_the_host() -> None:
    tree = Tree(n_host=16)
    nodes = [tree.computed(*range(10 * n, 10 * n + 5)) for n in range(1, 4)]
    for node in nodes:
        tree.forest.set_resident(node, HOST, range(5))
    tree.to_disk.offer(nodes)
    assert len(tree.to_disk.waiting) == 3
    (first,) = tree.to_disk.take(0) or []
    assert tree.to_disk.take(5) is None, "8 pages may be on their way"
    assert tree.to_disk.take(5, limit_pages=16) == [nodes[1]]
    tree.forest.set_resident(nodes[2], DISK)
    assert tree.to_disk.take(0) == [], "it has been written meanwhile"
    assert tree.to_disk.take(0) is None
    assert first is nodes[0]
