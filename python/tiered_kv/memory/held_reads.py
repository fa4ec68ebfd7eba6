"""Reads from cold stores: who waits for each, and the pages that stay on the host for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.node import Node
from tiered_kv.forest.residency import Residency
from tiered_kv.memory.cold_source import ColdSource, HostRoom, Read
from tiered_kv.memory.read_order import Pages, ReadOrder, Urgency
from tiered_kv.memory.ticket import Ticket, pages_on_host, path_up


@dataclass(slots=True)
class _UnderWay:
    read: Read
    source: ColdSource
    waiters: dict[str, Ticket] = field(default_factory=dict)


class HeldReads:
    """Keeps the forest in step with what `order` decides: what is read, held, and let go."""

    def __init__(self, forest: Forest, room: HostRoom, order: ReadOrder) -> None:
        self._forest = forest
        self._room = room
        self._order = order
        self._under_way: dict[int, _UnderWay] = {}

    def read(
        self, ticket: Ticket, cold: ColdSource, parent: Node, hashes: list[bytes], urgency: Urgency
    ) -> Node:
        """Reserves host pages, grows the tree by LOADING nodes and starts reading into them.

        Returns the last node: of fewer pages if there is no room for all, `parent` if for none.
        """
        forest, room = self._forest, self._room
        # Cheaper than giving up when the whole run does not fit: take its leading half, and so on.
        while hashes:
            host_pages = room.alloc_host(len(hashes), keep=parent)
            if host_pages is not None:
                break
            hashes = hashes[: len(hashes) // 2]
        else:
            return parent
        op = room.next_op()
        run = ticket.tokens[parent.end : parent.end + len(hashes) * forest.page_size]
        nodes = forest.extend(parent, run, Tier.HOST, Residency.LOADING, host_pages, op)
        last = nodes[-1]
        forest.pin(last, Tier.HOST)
        read = Read(op, last, hashes, host_pages)
        self._under_way[op] = _UnderWay(read, cold)
        cold.begin(read, urgency)
        self.join(ticket, op, urgency)
        return last

    def join(self, ticket: Ticket, op: int, urgency: Urgency) -> None:
        """It waits for this read, among others."""
        ticket.waiting_for[op] = None
        under_way = self._under_way[op]
        under_way.waiters[ticket.name] = ticket
        under_way.source.hurry(op, urgency)

    def hold(self, ticket: Ticket, last: Node, n_loaded_tokens: int) -> None:
        """All down to `last` stays on the host for it."""
        self._forest.pin(last, Tier.HOST)
        ticket.pinned, ticket.n_loaded_tokens = last, n_loaded_tokens
        pages = pages_on_host(path_up(last))
        self._order.hold(ticket.name, pages[: self._order.room_pages])

    def alone(self, ticket: Ticket) -> list[int]:
        """Those of the reads it waits for that nobody else does."""
        return [op for op in ticket.waiting_for if len(self._under_way[op].waiters) == 1]

    def let_go(self, ticket: Ticket) -> None:
        """Its pages are ordinary cache; what it alone waits for is not read on."""
        for op in ticket.waiting_for:
            waiters = self._under_way[op].waiters
            del waiters[ticket.name]
            if not waiters:
                self._forget(op)
        ticket.waiting_for.clear()
        ticket.n_read_tokens.clear()
        self._unpin(ticket)

    def _forget(self, op: int) -> None:
        """Nobody waits for it: as they thought it too slow? Then it is to be found out."""
        now_s, cold = self._room.now_s, self._under_way[op].source
        is_doubted = cold.probes.is_due(now_s)
        cold.forget(op, is_probe=is_doubted)
        if is_doubted:
            cold.probes.begun(now_s)

    def _unpin(self, ticket: Ticket) -> None:
        if ticket.pinned is not None:
            self._forest.unpin(ticket.pinned, Tier.HOST)
            self._order.let_go(ticket.name)
        ticket.pinned, ticket.n_loaded_tokens = None, 0

    def ended(
        self, op: int, n_done: int, heard: Callable[[Ticket], None], *, is_cleared: bool = False
    ) -> Tier:
        """The leading `n_done` pages of a read are there and readable; the rest is a miss.

        is_cleared: the store has been emptied meanwhile. heard: is told of all who waited for it.
        Returns where it came from.
        """
        forest, room = self._forest, self._room
        under_way = self._over(op, n_done)
        waiters, cold = under_way.waiters, under_way.source
        nodes, lost = forest.finish_leading(op, Tier.HOST, n_done)
        # Of those that another server wrote, or this one before a flush or its start, that is news.
        found = [node for node in nodes if node.state(cold.tier) is Residency.ABSENT]
        if not is_cleared:
            for node in found:
                forest.set_resident(node, cold.tier)
            room.stored(found, cold.tier)
        for node, slots in lost:
            room.free_host(cast(Pages, slots))
            if waiters and node.state(cold.tier) is Residency.RESIDENT:
                # So that it is written again when it is computed again.
                forest.evict(node, cold.tier)
                room.removed(node, cold.tier)
        n_read = sum(node.n_tokens for node in nodes)
        for ticket in waiters.values():
            del ticket.waiting_for[op]
            ticket.n_read_tokens[cold.tier] += n_read
            self._shorten(ticket, {node for node, _ in lost})
            heard(ticket)
        forest.unpin(under_way.read.last, Tier.HOST)
        room.stored(nodes, Tier.HOST)
        return cold.tier

    def ended_behind_flush(self, op: int, n_done: int) -> None:
        """The tree it was for is no more."""
        self._room.free_host(self._over(op, n_done).read.host_pages)

    def _over(self, op: int, n_done: int) -> _UnderWay:
        under_way = self._under_way.pop(op)
        if n_done:
            under_way.source.probes.begun(self._room.now_s)
        return under_way

    def _shorten(self, ticket: Ticket, lost: set[Node]) -> None:
        """Nothing below a page that did not come can be used: hold only what is above it."""
        before = keep = ticket.pinned
        if before is None or not lost:
            return
        for node in path_up(before):
            if node in lost:
                keep = node.parent
        if keep is None or keep is before:
            return
        n_loaded = max(0, ticket.n_loaded_tokens - (before.end - keep.end))
        self._forest.pin(keep, Tier.HOST)
        self._unpin(ticket)
        if n_loaded:
            self.hold(ticket, keep, n_loaded)
        self._forest.unpin(keep, Tier.HOST)
