"""What of one tier is to be written to a farther one, and what of that next.

A page is written as soon as it is there. What finds no room waits in a bounded list, the most
valuable first; what is evicted before its turn is lost to the tiers below. A prompt larger than the
host pool streams through it: its leading pages stay, the others make room for the next ones once a
store has them.

Whoever carries it out copies, and says what became of it. Nothing is copied or evicted here; a node
of which only a part fits is split.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.node import Node
from tiered_kv.forest.residency import Residency
from tiered_kv.memory.actions import WriteBack
from tiered_kv.memory.deferred import MAX_DEFERRED, DeferredNodes
from tiered_kv.memory.manager import MemoryManager

#: A node larger than this share of the host pool is written in parts: what fits is worth having.
HOST_WRITE_SHARE = 0.25
#: Of a prompt larger than the host pool, this share of the pool keeps the head.
STREAM_HEAD_SHARE = 0.5
#: What is on its way to the stores may hold this share of the host pool, in equal parts.
STORE_WRITES_SHARE = 0.5


class WriteThrough:
    """From `source`, where nodes are readable, to `target`, which is to have them as well."""

    def __init__(self, forest: Forest, manager: MemoryManager, source: Tier, target: Tier) -> None:
        self.source = source
        self.target = target
        self._forest = forest
        self._manager = manager
        self.waiting = DeferredNodes(manager.write_value, lambda: MAX_DEFERRED)

    def offer(self, nodes: Iterable[Node]) -> None:
        """Those of `nodes` that are readable in `source` and absent in `target` wait from now."""
        for action in self._wanted(tuple(nodes)):
            self.waiting.add(self._forest.node(action.node_id))

    def evicted(self, node: Node, parent: Node, tier: Tier) -> None:
        """`node` has left a tier. It cannot be written if it waited, but what is above it can.

        A node that waits may be split: only its lower half is still in the list, and goes first.
        """
        if tier is not self.source or node not in self.waiting:
            return
        self.waiting.discard(node)
        if not parent.is_root and self._is_unwritten(parent):
            self.waiting.add(parent)

    def clear(self) -> int:
        """The tree is about to be emptied: nothing waits any more; returns how many pages did."""
        lost = {n for node in self.waiting.nodes() for n in self._unwritten_path(node)}
        self.waiting.clear()
        return sum(node.n_pages for node in lost)

    def _wanted(self, nodes: Iterable[Node]) -> list[WriteBack]:
        if self.source is Tier.DEVICE:
            return self._manager.on_insert(nodes)
        return self._manager.on_host_resident(nodes, self.target)

    def _is_unwritten(self, node: Node) -> bool:
        return (
            node.state(self.source) is Residency.RESIDENT
            and node.state(self.target) is Residency.ABSENT
        )

    def _unwritten_path(self, node: Node) -> list[Node]:
        """The node and those above it that `target` lacks (it may have been split), top first."""
        path = []
        at: Node | None = node
        while at is not None and not at.is_root and self._is_unwritten(at):
            path.append(at)
            at = at.parent
        return path[::-1]


@dataclass(frozen=True, slots=True)
class HostWrite:
    """Copy a node from the device to the host."""

    node: Node
    keep: Node
    """The path down to this node must not make room for it."""


class HostWrites(WriteThrough):
    """From the device to a host pool of `n_pages`, which goes on to `stores`."""

    def __init__(
        self, forest: Forest, manager: MemoryManager, n_pages: int, stores: Sequence[Tier]
    ) -> None:
        super().__init__(forest, manager, Tier.DEVICE, Tier.HOST)
        self._n_pages = n_pages
        self._stores = tuple(stores)
        self._first: Node | None = None

    def due(self) -> Iterator[HostWrite]:
        """What to copy now, one after the other: each is to be begun before the next is asked for.

        If there is no room for one, the rest waits, and `found_no_room` is to be told.
        """
        while self.waiting:
            self._first = node = self.waiting.first()
            for part in self._parts(self._unwritten_path(node)):
                yield HostWrite(part, self._needed_above(part))
            self.waiting.discard(node)

    def found_no_room(self, n_free: int, *, is_written_on: bool) -> None:
        """There was no room for the last that was due, with `n_free` pages free.

        is_written_on: whether something on the host still waits to be written to a store.
        """
        evictable = self._forest.evictable_tokens(Tier.HOST) // self._forest.page_size
        if n_free + evictable == self._n_pages and not is_written_on and self._first is not None:
            # Nothing is in use that could make room later: its own path fills the pool.
            self.waiting.discard(self._first)

    def failed(self, node: Node) -> None:
        """`node` could not be copied: without it, those below are of no use on the host."""
        for below in self.waiting.nodes():
            at: Node | None = below
            while at is not None and at is not node:
                at = at.parent
            if at is node:
                self.waiting.discard(below)

    def _is_streamed(self, node: Node) -> bool:
        """Whether its path does not fit as a whole."""
        return node.end > self._n_pages * self._forest.page_size

    def _is_below(self, node: Node) -> bool:
        """Whether a store has it."""
        return any(node.state(tier) is Residency.RESIDENT for tier in self._stores)

    def _unwritten_path(self, node: Node) -> list[Node]:
        """Of a path that does not fit, those that a store has are not written to the host again."""
        if not self._is_streamed(node):
            return super()._unwritten_path(node)
        path = []
        at: Node | None = node
        while at is not None and not at.is_root:
            if self._is_unwritten(at) and not self._is_below(at):
                path.append(at)
            at = at.parent
        return path[::-1]

    def _parts(self, nodes: list[Node]) -> Iterator[Node]:
        """The nodes, split where one is too large to be written at once."""
        limit = max(1, int(self._n_pages * HOST_WRITE_SHARE))
        for node in nodes:
            while node.n_pages > limit:
                yield self._forest.split(node, limit)[0]
            yield node

    def _needed_above(self, node: Node) -> Node:
        """The lowest node above `node` whose host pages must not make room for it.

        Those that a store has may, if its path does not fit as a whole, but for its head.
        """
        assert node.parent is not None
        at = node.parent
        if self._is_streamed(node):
            head_tokens = self._n_pages * self._forest.page_size * STREAM_HEAD_SHARE
            while at.end > head_tokens and (
                at.state(Tier.HOST) is Residency.ABSENT or self._is_below(at)
            ):
                assert at.parent is not None
                at = at.parent
        return at


class StoreWrites(WriteThrough):
    """From a host pool of `n_host_pages` to a store.

    share: of the pool, the most that may be on its way: it is held until it has arrived, and a slow
    store must not keep the host tier from taking new pages.
    """

    def __init__(
        self, forest: Forest, manager: MemoryManager, store: Tier, n_host_pages: int, share: float
    ) -> None:
        super().__init__(forest, manager, Tier.HOST, store)
        self._limit_pages = max(1, int(n_host_pages * share))

    def leave(self) -> None:
        """The server ends: all that the host has is to be written, what was used last first."""
        self.waiting = DeferredNodes(lambda node: node.last_access, lambda: MAX_DEFERRED)
        lasting = (node for node in self._forest.nodes() if node.root.tree_key.is_lasting)
        for action in self._manager.on_leave(lasting, self.target):
            self.waiting.add(self._forest.node(action.node_id))

    def again(self, node: Node) -> None:
        """`node` was taken, in vain: it waits again, if it is still there."""
        if node in self._forest and self._is_unwritten(node):
            self.waiting.add(node)

    def take(self, pages_in_flight: int, limit_pages: int | None = None) -> list[Node] | None:
        """The next to write, each before those below it; None: nothing waits, or nothing fits.

        They may be none, if what waited has been written meanwhile. limit_pages: instead of its
        own.
        """
        if not self.waiting:
            return None
        limit = self._limit_pages if limit_pages is None else limit_pages
        node = self.waiting.first()
        if pages_in_flight and pages_in_flight + node.n_pages > limit:
            return None
        self.waiting.discard(node)
        return self._unwritten_path(node)
