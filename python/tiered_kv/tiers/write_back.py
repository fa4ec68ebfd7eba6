"""Write-through: device -> host, and on to the cold stores, so that eviction is only a free.

A page is written as soon as it is in the tree, in the background. What finds no room (every host
page is in use) waits in a bounded list, the most valuable first; what is evicted before its turn is
lost to the tiers below and would be computed again. A prompt larger than the host pool streams
through it: its leading pages stay, the others make room for the next ones once a store has them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from tiered_kv.core.ids import Tier
from tiered_kv.forest.node import Node
from tiered_kv.forest.residency import Residency
from tiered_kv.tiers.cold.tier import ColdTier
from tiered_kv.tiers.context import TierContext, device_slots_of
from tiered_kv.tiers.deferred import MAX_DEFERRED, DeferredNodes
from tiered_kv.tiers.slots import PageIds
from tiered_kv.tiers.streams import After
from tiered_kv.tiers.transfer import Completion, TransferQueue

#: A node larger than this share of the host pool is written in parts: what fits is worth having.
HOST_WRITE_SHARE = 0.25
#: Of a prompt larger than the host pool, this share of the pool keeps the head.
STREAM_HEAD_SHARE = 0.5
#: Copies under way hold their pages where they come from. If they hold more than this share of what
#: could be freed there, nothing holds them back.
PRESSED_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class HostWrite:
    op: int
    node: Node
    device_slots: torch.Tensor
    host_pages: PageIds
    after: After

    @property
    def n_pages(self) -> int:
        return len(self.host_pages)


class WriteBack:
    """Carries out the manager's WriteBack actions. colds: where the host's pages go on to."""

    def __init__(self, context: TierContext, colds: Sequence[ColdTier]) -> None:
        self._context = context
        self._colds = colds
        self.to_host: TransferQueue[HostWrite] = TransferQueue(
            "device-to-host", self._copy, context.copier.use_device
        )
        self._deferred = DeferredNodes(context.manager.write_value, lambda: MAX_DEFERRED)
        context.evicted = self._evicted

    @property
    def n_deferred(self) -> int:
        return len(self._deferred) + sum(cold.writes.n_deferred for cold in self._colds)

    def inserted(self, nodes: Iterable[Node]) -> None:
        """`nodes` are readable on the device: those that the host lacks are to be written."""
        for action in self._context.manager.on_insert(tuple(nodes)):
            self._deferred.add(self._context.forest.node(action.node_id))
        self._start_host_writes()

    def resident_on_host(self, nodes: Iterable[Node]) -> None:
        """`nodes`, of one tree, are to be in the stores as well, as far as the host has them."""
        nodes = tuple(nodes)
        for cold in self._colds:
            cold.writes.offer(nodes)

    def advance(self) -> None:
        """Starts what had to wait, as far as there is room now."""
        self._context.pacer.press(self._is_pressed())
        for cold in self._colds:
            cold.writes.advance()
        if self._deferred:
            self._start_host_writes()

    def _is_pressed(self) -> bool:
        context = self._context
        if self.to_host.in_flight:
            free = context.forest.evictable_tokens(Tier.DEVICE) + context.allocator.available()
            held = self.to_host.pages_in_flight * context.page_size
            if held > PRESSED_SHARE * (free + held):
                return True
        in_flight = sum(cold.writes.queue.pages_in_flight for cold in self._colds)
        return in_flight > PRESSED_SHARE * context.host.n_pages

    def hand_over(self) -> list[PageIds]:
        """The tree is about to be emptied, and no copy to the host is under way.

        Starts all writes to the stores that had to wait, and forgets the rest. Returns the host
        pages of each that is under way: they stay until it is acknowledged.
        """
        pages = [pages for cold in self._colds for pages in cold.writes.hand_over()]
        lost = {n for node in self._deferred.nodes() for n in self._unwritten_path(node)}
        if lost:
            self._context.observer.unwritten(Tier.HOST, sum(node.n_pages for node in lost))
        self._deferred.clear()
        return pages

    def _evicted(self, node: Node, parent: Node, tier: Tier) -> None:
        """What waited and is gone cannot be written; what is left of its path still can.

        A node that waits may be split: only its lower half is still in the list, and goes first.
        """
        if tier is Tier.HOST:
            for cold in self._colds:
                cold.writes.evicted(node, parent)
        if tier is not Tier.DEVICE or node not in self._deferred:
            return
        self._deferred.discard(node)
        if (
            not parent.is_root
            and parent.state(Tier.DEVICE) is Residency.RESIDENT
            and parent.state(Tier.HOST) is Residency.ABSENT
        ):
            self._deferred.add(parent)

    # -- device -> host -----------------------------------------------------------------------

    def _start_host_writes(self) -> None:
        while self._deferred:
            node = self._deferred.first()
            if not all(map(self._start_host_write, self._parts(self._unwritten_path(node)))):
                if not self._is_host_in_use() and not self._is_written_on():
                    # Nothing is in use that could make room later: its own path fills the pool.
                    self._deferred.discard(node)
                return
            self._deferred.discard(node)

    def _is_written_on(self) -> bool:
        """Whether something on the host still waits to be written to a store."""
        return any(cold.writes.n_deferred for cold in self._colds)

    def _is_below(self, node: Node) -> bool:
        """Whether a store has it."""
        return any(node.state(cold.tier) is Residency.RESIDENT for cold in self._colds)

    def _is_host_in_use(self) -> bool:
        """Whether host pages are held that will be free later: by nodes, or behind a flush."""
        host, forest = self._context.host, self._context.forest
        evictable = forest.evictable_tokens(Tier.HOST) // self._context.page_size
        return host.n_free + evictable < host.n_pages

    def _unwritten_path(self, node: Node) -> list[Node]:
        """The node and those above it that lack a host copy (it may have been split), top first.

        Of a path that does not fit, those that a store has are not written to the host again.
        """
        is_streamed = node.end > self._context.host.n_pages * self._context.page_size
        path = []
        at: Node | None = node
        while at is not None and not at.is_root:
            if at.state(Tier.HOST) is not Residency.ABSENT:
                if not is_streamed:
                    break
            elif at.state(Tier.DEVICE) is Residency.RESIDENT and not (
                is_streamed and self._is_below(at)
            ):
                path.append(at)
            at = at.parent
        return path[::-1]

    def _parts(self, nodes: list[Node]) -> Iterator[Node]:
        """The nodes, split where one is too large to be written at once."""
        limit = max(1, int(self._context.host.n_pages * HOST_WRITE_SHARE))
        for node in nodes:
            while node.n_pages > limit:
                yield self._context.forest.split(node, limit)[0]
            yield node

    def _start_host_write(self, node: Node) -> bool:
        context = self._context
        host_pages = context.alloc_host(node.n_pages, keep=self._needed_above(node))
        if host_pages is None:
            return False
        op = context.next_op()
        slots = device_slots_of(node)
        context.forest.start_transfer(node, Tier.HOST, Residency.WRITING_BACK, host_pages, op)
        context.forest.pin(node, Tier.DEVICE)
        self.to_host.submit(HostWrite(op, node, slots, host_pages, context.order_after()))
        return True

    def _needed_above(self, node: Node) -> Node:
        """The lowest node above `node` whose host pages must not make room for it.

        Those that a store has may, if its path does not fit as a whole, but for its head.
        """
        assert node.parent is not None
        at = node.parent
        n_tokens = self._context.host.n_pages * self._context.page_size
        if node.end > n_tokens:
            while at.end > n_tokens * STREAM_HEAD_SHARE and (
                at.state(Tier.HOST) is Residency.ABSENT or self._is_below(at)
            ):
                assert at.parent is not None
                at = at.parent
        return at

    def _copy(self, job: HostWrite) -> int:
        context, size = self._context, self._context.page_size
        page_bytes = context.copier.page_format.page_bytes
        device_s: list[float] = []
        for part in context.pacer.portions(job.n_pages, page_bytes):
            slots = job.device_slots[part.start * size : part.stop * size]
            with context.pacer.turn((part.stop - part.start) * page_bytes) as held_up_s:
                self.to_host.exclude(held_up_s)
                seconds = context.copier.to_host(slots, job.host_pages[part], job.after)
            if seconds is not None:
                device_s.append(seconds)
        if device_s:
            self.to_host.took(sum(device_s))
        return job.n_pages

    def host_written(self, completion: Completion[HostWrite]) -> None:
        context, job = self._context, completion.job
        context.forest.unpin(job.node, Tier.DEVICE)
        if completion.n_done < job.n_pages:
            context.observer.unwritten(Tier.HOST, job.n_pages)
            for node, slots in context.forest.abort_transfer(job.op, Tier.HOST):
                context.host.free(cast(PageIds, slots))
                self._give_up_below(node)
            return
        nodes = context.forest.finish_transfer(job.op, Tier.HOST)
        context.transferred(Tier.DEVICE, Tier.HOST, completion)
        context.stored(nodes, Tier.HOST)
        self.resident_on_host(nodes)

    def _give_up_below(self, failed: Node) -> None:
        """Without the pages above them, those below are of no use on the host."""
        for node in self._deferred.nodes():
            at: Node | None = node
            while at is not None and at is not failed:
                at = at.parent
            if at is failed:
                self._deferred.discard(node)
