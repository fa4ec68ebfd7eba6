"""Reads from disk under way, who waits for each, and the pages that stay on the host for them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import cast

from tiered_kv.core.ids import Tier
from tiered_kv.forest.node import Node
from tiered_kv.forest.residency import Residency
from tiered_kv.memory.probes import Probes
from tiered_kv.scheduler.read_order import ReadOrder, Urgency
from tiered_kv.tiers.context import TierContext
from tiered_kv.tiers.read_queue import DiskRead, ReadQueue
from tiered_kv.tiers.slots import PageIds
from tiered_kv.tiers.ticket import Ticket, pages_on_host, path_up
from tiered_kv.tiers.timeline import DISK_READS
from tiered_kv.tiers.transfer import Completion


class HeldReads:
    """Carries out what `order` decides: reads, pins, and lets go."""

    def __init__(self, context: TierContext, order: ReadOrder) -> None:
        self._context = context
        self._order = order
        self.queue = ReadQueue("disk-to-host", self._read)
        self.probes = Probes()
        self._waiters: dict[int, dict[str, Ticket]] = {}

    def read(self, ticket: Ticket, parent: Node, hashes: list[bytes], urgency: Urgency) -> Node:
        """Reserves host pages, grows the tree by LOADING nodes and starts reading into them.

        Returns the last node: of fewer pages if there is no room for all, `parent` if for none.
        """
        context = self._context
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
        assert context.disk is not None
        self._waiters[op] = {}
        read = DiskRead(op, context.disk, last, hashes, host_pages, context.epoch)
        self.queue.submit_by(read, urgency)
        self.join(ticket, op, urgency)
        return last

    def join(self, ticket: Ticket, op: int, urgency: Urgency) -> None:
        """It waits for this read, among others."""
        ticket.waiting_for[op] = None
        self._waiters[op][ticket.name] = ticket
        self.queue.hurry(op, urgency)

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
        now_s = self._context.now_s
        is_doubted = self.probes.is_due(now_s)
        self.queue.forget(op, is_probe=is_doubted)
        if is_doubted:
            self.probes.begun(now_s)

    def _unpin(self, ticket: Ticket) -> None:
        if ticket.pinned is not None:
            self._context.forest.unpin(ticket.pinned, Tier.HOST)
            self._order.let_go(ticket.name)
        ticket.pinned, ticket.n_loaded_tokens = None, 0

    def _read(self, job: DiskRead, stretch: slice) -> int:
        timeline = self._context.timeline
        views = self._context.host.views(job.host_pages[stretch])
        began_s = time.perf_counter()
        n_read = job.disk.read_pages(job.hashes[stretch], views)
        if timeline is not None:
            now_s = time.perf_counter()
            timeline.span(DISK_READS, f"{n_read} pages", began_s, now_s, op=job.op)
        return n_read

    def finished(self, completion: Completion[DiskRead], heard: Callable[[Ticket], None]) -> None:
        """The leading pages that arrived become readable; the rest are a miss, and computed.

        heard: is told of all who waited for it.
        """
        context, job = self._context, completion.job
        waiters = self._waiters.pop(job.op)
        if completion.n_done:
            self.probes.begun(context.now_s)
        if job.epoch.flushes != context.epoch.flushes:
            context.host.free(job.host_pages)
            return
        nodes, lost = context.forest.finish_leading(job.op, Tier.HOST, completion.n_done)
        for node in nodes:
            if node.state(Tier.DISK) is Residency.ABSENT and job.epoch == context.epoch:
                context.forest.set_resident(node, Tier.DISK)
        for node, slots in lost:
            context.host.free(cast(PageIds, slots))
            if waiters and node.state(Tier.DISK) is Residency.RESIDENT:
                # So that it is written again when it is computed again.
                context.forest.evict(node, Tier.DISK)
        for ticket in waiters.values():
            del ticket.waiting_for[job.op]
            self._shorten(ticket, {node for node, _ in lost})
            heard(ticket)
        context.forest.unpin(job.last, Tier.HOST)
        context.transferred(Tier.DISK, Tier.HOST, completion)
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
