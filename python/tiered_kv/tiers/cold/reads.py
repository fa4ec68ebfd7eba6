"""Reads from cold stores: who waits for each, and the pages that stay on the host for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from tiered_kv.core.ids import Tier
from tiered_kv.forest.node import Node
from tiered_kv.forest.residency import Residency
from tiered_kv.scheduler.read_order import ReadOrder, Urgency
from tiered_kv.tiers.cold.read_queue import ColdRead
from tiered_kv.tiers.cold.tier import ColdTier
from tiered_kv.tiers.context import TierContext
from tiered_kv.tiers.slots import PageIds
from tiered_kv.tiers.ticket import Ticket, pages_on_host, path_up
from tiered_kv.tiers.transfer import Completion


class HeldReads:
    """Carries out what `order` decides: reads, pins, and lets go."""

    def __init__(self, context: TierContext, order: ReadOrder) -> None:
        self._context = context
        self._order = order
        self._waiters: dict[int, dict[str, Ticket]] = {}
        self._source: dict[int, ColdTier] = {}
        """Of each read under way."""

    def read(
        self, ticket: Ticket, cold: ColdTier, parent: Node, hashes: list[bytes], urgency: Urgency
    ) -> Node:
        """Reserves host pages, grows the tree by LOADING nodes and starts reading into them.

        Returns the last node: of fewer pages if there is no room for all, `parent` if for none.
        """
        context, store = self._context, cold.store
        assert store is not None
        # Cheaper than giving up when the whole run does not fit: take its leading half, and so on.
        while hashes:
            host_pages = context.alloc_host(len(hashes), keep=parent)
            if host_pages is not None:
                break
            hashes = hashes[: len(hashes) // 2]
        else:
            return parent
        op = context.next_op()
        run = ticket.tokens[parent.end : parent.end + len(hashes) * context.page_size]
        nodes = context.forest.extend(parent, run, Tier.HOST, Residency.LOADING, host_pages, op)
        last = nodes[-1]
        context.forest.pin(last, Tier.HOST)
        self._waiters[op], self._source[op] = {}, cold
        read = ColdRead(op, store, last, hashes, host_pages, context.epoch)
        cold.reads.submit_by(read, urgency)
        self.join(ticket, op, urgency)
        return last

    def join(self, ticket: Ticket, op: int, urgency: Urgency) -> None:
        """It waits for this read, among others."""
        ticket.waiting_for[op] = None
        self._waiters[op][ticket.name] = ticket
        self._source[op].reads.hurry(op, urgency)

    def hold(self, ticket: Ticket, last: Node, n_loaded_tokens: int) -> None:
        """All down to `last` stays on the host for it."""
        self._context.forest.pin(last, Tier.HOST)
        ticket.pinned, ticket.n_loaded_tokens = last, n_loaded_tokens
        pages = pages_on_host(path_up(last))
        self._order.hold(ticket.name, pages[: self._order.room_pages])

    def let_go(self, ticket: Ticket) -> None:
        """Its pages are ordinary cache; what it alone waits for is not read on."""
        for op in ticket.waiting_for:
            waiters = self._waiters[op]
            del waiters[ticket.name]
            if not waiters:
                self._forget(op)
        ticket.waiting_for.clear()
        self._unpin(ticket)

    def _forget(self, op: int) -> None:
        """Nobody waits for it: as they thought it too slow? Then it is to be found out."""
        now_s, cold = self._context.now_s, self._source[op]
        is_doubted = cold.probes.is_due(now_s)
        cold.reads.forget(op, is_probe=is_doubted)
        if is_doubted:
            cold.probes.begun(now_s)

    def _unpin(self, ticket: Ticket) -> None:
        if ticket.pinned is not None:
            self._context.forest.unpin(ticket.pinned, Tier.HOST)
            self._order.let_go(ticket.name)
        ticket.pinned, ticket.n_loaded_tokens = None, 0

    def finished(self, completion: Completion[ColdRead], heard: Callable[[Ticket], None]) -> None:
        """The leading pages that arrived become readable; the rest are a miss, and computed.

        heard: is told of all who waited for it.
        """
        context, job = self._context, completion.job
        waiters, cold = self._waiters.pop(job.op), self._source.pop(job.op)
        if completion.n_done:
            cold.probes.begun(context.now_s)
        if job.epoch.flushes != context.epoch.flushes:
            context.host.free(job.host_pages)
            return
        nodes, lost = context.forest.finish_leading(job.op, Tier.HOST, completion.n_done)
        for node in nodes:
            if node.state(cold.tier) is Residency.ABSENT and job.epoch == context.epoch:
                context.forest.set_resident(node, cold.tier)
        for node, slots in lost:
            context.host.free(cast(PageIds, slots))
            if waiters and node.state(cold.tier) is Residency.RESIDENT:
                # So that it is written again when it is computed again.
                context.forest.evict(node, cold.tier)
        for ticket in waiters.values():
            del ticket.waiting_for[job.op]
            self._shorten(ticket, {node for node, _ in lost})
            heard(ticket)
        context.forest.unpin(job.last, Tier.HOST)
        context.transferred(cold.tier, Tier.HOST, completion)
        context.stored(nodes, Tier.HOST)

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
        self._context.forest.pin(keep, Tier.HOST)
        self._unpin(ticket)
        if n_loaded:
            self.hold(ticket, keep, n_loaded)
        self._context.forest.unpin(keep, Tier.HOST)
