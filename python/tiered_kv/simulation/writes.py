"""Write-through under the virtual clock: carries out what `memory.write_through` decides."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
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
from tiered_kv.simulation.host import HostMemory
from tiered_kv.simulation.reads import SimulatedStore
from tiered_kv.simulation.transfers import Link


@dataclass(frozen=True, slots=True)
class StoreEdge:
    """A store below the host, and how pages get there."""

    tier: Tier
    store: SimulatedStore
    link: Link


class Writes:
    """Device to host, and on to the stores, if there are any.

    unit_bytes: of a unit of the forest. changed: is told of nodes that became readable.
    """

    def __init__(
        self,
        forest: Forest,
        manager: MemoryManager,
        host: HostMemory,
        to_host: Link,
        edges: Sequence[StoreEdge],
        unit_bytes: int,
        changed: Callable[[Sequence[Node]], None],
    ) -> None:
        self._forest = forest
        self._host = host
        self._link_to_host = to_host
        self._unit_bytes = unit_bytes
        self._changed = changed
        self._to_host = HostWrites(forest, manager, host.n_units, [edge.tier for edge in edges])
        share = STORE_WRITES_SHARE / max(1, len(edges))
        self._to_stores = [
            _ToStore(forest, manager, host, edge, share, unit_bytes, self.advance) for edge in edges
        ]

    def used(self, last: Node, adopted: Sequence[Node] = ()) -> None:
        """The path down to `last` is used; `adopted`, if any, are its nodes that are new.

        As in the server's `KVHierarchy.insert`, what was left unwritten before is offered again.
        """
        self._to_host.offer(adopted or (last,))
        self._start_to_host()
        if self._to_stores:
            path = tuple(path_up(last))
            for writes in self._to_stores:
                writes.offer(path)
                writes.used.note(last)

    def evicted(self, node: Node, parent: Node, tier: Tier) -> None:
        """`node` has left a tier."""
        self._to_host.evicted(node, parent, tier)
        for writes in self._to_stores:
            writes.waiting.evicted(node, parent, tier)

    def advance(self) -> None:
        """Starts what had to wait, as far as there is room now."""
        for writes in self._to_stores:
            writes.look_after()
            writes.start()
        if self._to_host.waiting:
            self._start_to_host()

    def _start_to_host(self) -> None:
        for write in self._to_host.due():
            if not self._write_to_host(write):
                is_written_on = any(writes.waiting.waiting for writes in self._to_stores)
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
            for writes in self._to_stores:
                writes.offer(written)
            self.advance()

        self._link_to_host.submit(node.n_pages * self._unit_bytes, done)
        return True


class _ToStore:
    """Host to one store."""

    def __init__(
        self,
        forest: Forest,
        manager: MemoryManager,
        host: HostMemory,
        edge: StoreEdge,
        share: float,
        unit_bytes: int,
        advance: Callable[[], None],
    ) -> None:
        self._forest = forest
        self._host = host
        self._edge = edge
        self._unit_bytes = unit_bytes
        self._advance = advance
        self.waiting = StoreWrites(forest, manager, edge.tier, host.n_units, share)
        self.used = UsedNodes(forest, edge.tier)
        self._dropped = DroppedPages(forest, edge.tier, lambda: edge.store)
        self._units_under_way = 0

    def offer(self, nodes: Iterable[Node]) -> None:
        self.waiting.offer(nodes)
        self.start()

    def look_after(self) -> None:
        """What it gave up is not there any more, and it is told what is used above it."""
        store = self._edge.store
        if store.has_dropped or self._dropped.is_looking:
            self._dropped.counted(self._dropped.votes())
        now_s = self._host.now_s
        if self.used.is_due(now_s):
            store.touch(chain.from_iterable(self.used.take(now_s)))

    def start(self) -> None:
        while (path := self.waiting.take(self._units_under_way)) is not None:
            for node in path:
                self._write(node)

    def _write(self, node: Node) -> None:
        forest, op, n_units = self._forest, self._host.next_op(), node.n_pages
        tier, store = self._edge.tier, self._edge.store
        forest.start_transfer(node, tier, Residency.WRITING_BACK, None, op)
        forest.pin(node, Tier.HOST)
        self._units_under_way += n_units
        # Whoever adds to a prefix uses it. Told with all that is used: each for itself took most of
        # a run's time where prompts are long.
        assert node.parent is not None
        self.used.note(node.parent)

        def done(_: float) -> None:
            forest.unpin(node, Tier.HOST)
            self._units_under_way -= n_units
            hashes = [name for part in forest.nodes_of(op) for name in part.page_hashes]
            if store.put(hashes) == len(hashes):
                forest.finish_transfer(op, tier)
            else:
                forest.abort_transfer(op, tier)
            self._advance()

        self._edge.link.submit(n_units * self._unit_bytes, done)
