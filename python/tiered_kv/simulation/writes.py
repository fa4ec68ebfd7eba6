"""Write-through under the virtual clock: carries out what `memory.write_through` decides."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain

from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.node import Node
from tiered_kv.forest.residency import Residency
from tiered_kv.memory.manager import MemoryManager
from tiered_kv.memory.store_use import DroppedPages, UsedNodes
from tiered_kv.memory.ticket import path_up
from tiered_kv.memory.write_through import (
    STORE_WRITES_SHARE,
    HostWrite,
    HostWrites,
    StoreWrites,
)
from tiered_kv.simulation.disk import SimulatedDisk
from tiered_kv.simulation.host import HostMemory
from tiered_kv.simulation.transfers import Link


class Writes:
    """Device to host, and on to the disk if there is one.

    unit_bytes: of a unit of the forest. changed: is told of nodes that became readable.
    """

    def __init__(
        self,
        forest: Forest,
        manager: MemoryManager,
        host: HostMemory,
        disk: SimulatedDisk | None,
        links: tuple[Link, Link],
        unit_bytes: int,
        changed: Callable[[Sequence[Node]], None],
    ) -> None:
        """links: to the host, and on to the disk."""
        self._forest = forest
        self._host = host
        self._disk = disk
        self._link_to_host, self._link_to_disk = links
        self._unit_bytes = unit_bytes
        self._changed = changed
        stores = [Tier.DISK] if disk is not None else []
        self._to_host = HostWrites(forest, manager, host.n_units, stores)
        self._to_disk = StoreWrites(
            forest, manager, Tier.DISK, host.n_units, STORE_WRITES_SHARE / max(1, len(stores))
        )
        self._units_to_disk = 0
        self._dropped = DroppedPages(forest, Tier.DISK, lambda: disk)
        self._used = UsedNodes(forest, Tier.DISK)

    def used(self, last: Node, adopted: Sequence[Node] = ()) -> None:
        """The path down to `last` is used; `adopted`, if any, are its nodes that are new.

        As in the server's `KVHierarchy.insert`, what was left unwritten before is offered again.
        """
        self._to_host.offer(adopted or (last,))
        self._start_to_host()
        if self._disk is not None:
            self._offer_to_disk(tuple(path_up(last)))
            self._used.note(last)

    def evicted(self, node: Node, parent: Node, tier: Tier) -> None:
        """`node` has left a tier."""
        self._to_host.evicted(node, parent, tier)
        self._to_disk.evicted(node, parent, tier)

    def advance(self) -> None:
        """Starts what had to wait, as far as there is room now."""
        if self._disk is not None:
            self._look_after(self._disk)
        if self._to_disk.waiting:
            self._start_to_disk()
        if self._to_host.waiting:
            self._start_to_host()

    def _look_after(self, disk: SimulatedDisk) -> None:
        """What it gave up is not there any more, and it is told what is used above it."""
        if disk.has_dropped or self._dropped.is_looking:
            self._dropped.counted(self._dropped.votes())
        now_s = self._host.now_s
        if self._used.is_due(now_s):
            disk.touch(chain.from_iterable(self._used.take(now_s)))

    def _start_to_host(self) -> None:
        for write in self._to_host.due():
            if not self._write_to_host(write):
                is_written_on = bool(self._to_disk.waiting)
                self._to_host.found_no_room(self._host.n_free, is_written_on=is_written_on)
                return

    def _write_to_host(self, write: HostWrite) -> bool:
        forest, node = self._forest, write.node
        pages = self._host.alloc_host(node.n_pages, keep=write.keep)
        if pages is None:
            return False
        op = self._host.next_op()
        forest.start_transfer(node, Tier.HOST, Residency.WRITING_BACK, pages, op)
        forest.pin(node, Tier.DEVICE)

        def done(_: float) -> None:
            forest.unpin(node, Tier.DEVICE)
            written = forest.finish_transfer(op, Tier.HOST)
            self._changed(written)
            self._offer_to_disk(written)
            self.advance()

        self._link_to_host.submit(node.n_pages * self._unit_bytes, done)
        return True

    def _offer_to_disk(self, nodes: Iterable[Node]) -> None:
        if self._disk is not None:
            self._to_disk.offer(nodes)
            self._start_to_disk()

    def _start_to_disk(self) -> None:
        while (path := self._to_disk.take(self._units_to_disk)) is not None:
            for node in path:
                self._write_to_disk(node)

    def _write_to_disk(self, node: Node) -> None:
        forest, disk, op = self._forest, self._disk, self._host.next_op()
        assert disk is not None
        n_units = node.n_pages
        forest.start_transfer(node, Tier.DISK, Residency.WRITING_BACK, None, op)
        forest.pin(node, Tier.HOST)
        self._units_to_disk += n_units
        # Whoever adds to a prefix uses it. Told with all that is used: each for itself took most of
        # a run's time where prompts are long.
        assert node.parent is not None
        self._used.note(node.parent)

        def done(_: float) -> None:
            forest.unpin(node, Tier.HOST)
            self._units_to_disk -= n_units
            hashes = [name for part in forest.nodes_of(op) for name in part.page_hashes]
            if disk.put(hashes) == len(hashes):
                forest.finish_transfer(op, Tier.DISK)
            else:
                forest.abort_transfer(op, Tier.DISK)
            self.advance()

        self._link_to_disk.submit(n_units * self._unit_bytes, done)
