"""Write-through: device -> host, and on to the cold stores, so that eviction is only a free.

A page is written as soon as it is in the tree, in the background. What is written next, and for
what others make room, is for `memory.write_through` to say.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from tiered_kv.core.ids import Tier
from tiered_kv.forest.node import Node
from tiered_kv.forest.residency import Residency
from tiered_kv.memory.write_through import HostWrite, HostWrites
from tiered_kv.tiers.cold.tier import ColdTier
from tiered_kv.tiers.context import TierContext, device_slots_of
from tiered_kv.tiers.slots import PageIds
from tiered_kv.tiers.streams import After
from tiered_kv.tiers.transfer import Completion, TransferQueue

#: Copies under way hold their pages where they come from. If they hold more than this share of what
#: could be freed there, nothing holds them back.
PRESSED_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class HostCopy:
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
        self.to_host: TransferQueue[HostCopy] = TransferQueue(
            "device-to-host", self._copy, context.copier.use_device
        )
        self._next = HostWrites(
            context.forest, context.manager, context.host.n_pages, [cold.tier for cold in colds]
        )
        context.evicted = self._evicted

    @property
    def n_deferred(self) -> int:
        return len(self._next.waiting) + sum(cold.writes.n_deferred for cold in self._colds)

    def inserted(self, nodes: Iterable[Node]) -> None:
        """`nodes` are readable on the device: those that the host lacks are to be written."""
        self._next.offer(nodes)
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
        if self._next.waiting:
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
        if n_lost := self._next.clear():
            self._context.observer.unwritten(Tier.HOST, n_lost)
        return pages

    def _evicted(self, node: Node, parent: Node, tier: Tier) -> None:
        """What waited and is gone cannot be written; what is left of its path still can."""
        for cold in self._colds:
            cold.writes.evicted(node, parent, tier)
        self._next.evicted(node, parent, tier)

    # -- device -> host -----------------------------------------------------------------------

    def _start_host_writes(self) -> None:
        for write in self._next.due():
            if not self._start_host_write(write):
                is_written_on = any(cold.writes.n_deferred for cold in self._colds)
                self._next.found_no_room(self._context.host.n_free, is_written_on=is_written_on)
                return

    def _start_host_write(self, write: HostWrite) -> bool:
        context, node = self._context, write.node
        host_pages = context.alloc_host(node.n_pages, keep=write.keep)
        if host_pages is None:
            return False
        op = context.next_op()
        slots = device_slots_of(node)
        context.forest.start_transfer(node, Tier.HOST, Residency.WRITING_BACK, host_pages, op)
        context.forest.pin(node, Tier.DEVICE)
        self.to_host.submit(HostCopy(op, node, slots, host_pages, context.order_after()))
        return True

    def _copy(self, job: HostCopy) -> int:
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

    def host_written(self, completion: Completion[HostCopy]) -> None:
        context, job = self._context, completion.job
        context.forest.unpin(job.node, Tier.DEVICE)
        if completion.n_done < job.n_pages:
            context.observer.unwritten(Tier.HOST, job.n_pages)
            for node, slots in context.forest.abort_transfer(job.op, Tier.HOST):
                context.host.free(cast(PageIds, slots))
                self._next.failed(node)
            return
        nodes = context.forest.finish_transfer(job.op, Tier.HOST)
        context.transferred(Tier.DEVICE, Tier.HOST, completion)
        context.stored(nodes, Tier.HOST)
        self.resident_on_host(nodes)
