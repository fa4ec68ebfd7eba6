"""Write-through: device -> host -> disk, in the background, so that eviction is only a free.

A page is written as soon as it is in the tree. What finds no room (the queue is full, or every host
page is in use) waits in a bounded list, the most valuable first; what is evicted before its turn is
lost to the tiers below and would be computed again. A prompt larger than the host pool streams
through it: its leading pages stay, the others make room for the next ones once the disk has them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import cast

import torch

from tiered_kv.core.ids import Tier
from tiered_kv.forest.node import Node
from tiered_kv.forest.residency import Residency
from tiered_kv.tiers.context import TierContext, device_slots_of, host_pages_of
from tiered_kv.tiers.deferred import DeferredNodes
from tiered_kv.tiers.device import After, wait_for
from tiered_kv.tiers.disk_pages import DiskPages
from tiered_kv.tiers.slots import PageIds
from tiered_kv.tiers.transfer import Completion, TransferQueue

#: Disk writes hold their host pages: they may have at most this share of the host pool in flight,
#: so that a slow disk never stops the host tier from taking new pages.
DISK_WRITE_SHARE = 0.5
#: A node larger than this share of the host pool is written in parts: what fits is worth having.
HOST_WRITE_SHARE = 0.25
#: Of a prompt larger than the host pool, this share of the pool keeps the head.
STREAM_HEAD_SHARE = 0.5
MAX_DEFERRED = 16384
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


@dataclass(frozen=True, slots=True)
class DiskWrite:
    op: int
    disk: DiskPages
    node: Node
    hashes: list[bytes]
    host_pages: PageIds
    above: tuple[list[bytes], ...]

    @property
    def n_pages(self) -> int:
        return len(self.hashes)


class WriteBack:
    """Carries out the manager's WriteBack actions."""

    def __init__(self, context: TierContext) -> None:
        self._context = context
        self.to_host: TransferQueue[HostWrite] = TransferQueue("device-to-host", self._copy)
        self.to_disk: TransferQueue[DiskWrite] = TransferQueue("host-to-disk", self._write)
        value = context.manager.write_value
        self._host_deferred = DeferredNodes(value, lambda: MAX_DEFERRED)
        self._disk_deferred = DeferredNodes(value, lambda: MAX_DEFERRED)
        context.evicted = self._evicted

    @property
    def n_deferred(self) -> int:
        return len(self._host_deferred) + len(self._disk_deferred)

    def inserted(self, nodes: Iterable[Node]) -> None:
        """`nodes` are readable on the device: those that the host lacks are to be written."""
        for action in self._context.manager.on_insert(tuple(nodes)):
            self._defer(self._host_deferred, action.node_id)
        self._start_host_writes()

    def resident_on_host(self, nodes: Iterable[Node]) -> None:
        """`nodes`, of one tree, are to be on disk as well if they are readable on the host."""
        nodes = tuple(nodes)
        if self._context.disk is None or not nodes or not nodes[0].root.tree_key.is_lasting:
            return
        for action in self._context.manager.on_host_resident(nodes):
            self._defer(self._disk_deferred, action.node_id)
        self._start_disk_writes()

    def advance(self) -> None:
        """Starts what had to wait, as far as there is room now."""
        self._context.pacer.press(self._is_pressed())
        if self._disk_deferred:
            self._start_disk_writes()
        if self._host_deferred:
            self._start_host_writes()

    def _is_pressed(self) -> bool:
        context = self._context
        if self.to_host.in_flight:
            free = context.forest.evictable_tokens(Tier.DEVICE) + context.allocator.available()
            held = self.to_host.pages_in_flight * context.page_size
            if held > PRESSED_SHARE * (free + held):
                return True
        return self.to_disk.pages_in_flight > PRESSED_SHARE * context.host.n_pages

    def clear(self) -> None:
        """Forgets what has not been started (the tree is being emptied)."""
        self._host_deferred.clear()
        self._disk_deferred.clear()

    def _defer(self, deferred: DeferredNodes, node_id: int) -> None:
        deferred.add(self._context.forest.node(node_id))

    def _evicted(self, node: Node, parent: Node, tier: Tier) -> None:
        """What waited and is gone cannot be written; what is left of its path still can.

        A node that waits may be split: only its lower half is still in the list, and goes first.
        """
        deferred = {Tier.DEVICE: self._host_deferred, Tier.HOST: self._disk_deferred}.get(tier)
        if deferred is None or node not in deferred:
            return
        deferred.discard(node)
        target = Tier.HOST if tier is Tier.DEVICE else Tier.DISK
        if (
            not parent.is_root
            and parent.state(tier) is Residency.RESIDENT
            and parent.state(target) is Residency.ABSENT
        ):
            deferred.add(parent)

    # -- device -> host -----------------------------------------------------------------------

    def _start_host_writes(self) -> None:
        while self._host_deferred:
            node = self._host_deferred.first()
            if not all(map(self._start_host_write, self._parts(self._unwritten_path(node)))):
                protected = self._context.forest.protected_tokens(Tier.HOST)
                if protected == 0 and not self._disk_deferred:
                    # Nothing is in use that could make room later: its own path fills the pool.
                    self._host_deferred.discard(node)
                return
            self._host_deferred.discard(node)

    def _unwritten_path(self, node: Node) -> list[Node]:
        """The node and those above it that lack a host copy (it may have been split), top first.

        Of a path that does not fit, those that the disk has are not written to the host again.
        """
        is_streamed = node.end > self._context.host.n_pages * self._context.page_size
        path = []
        at: Node | None = node
        while at is not None and not at.is_root:
            if at.state(Tier.HOST) is not Residency.ABSENT:
                if not is_streamed:
                    break
            elif at.state(Tier.DEVICE) is Residency.RESIDENT and not (
                is_streamed and at.state(Tier.DISK) is Residency.RESIDENT
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

        Those that the disk has may, if its path does not fit as a whole, but for its head.
        """
        assert node.parent is not None
        at = node.parent
        n_tokens = self._context.host.n_pages * self._context.page_size
        if node.end > n_tokens:
            while at.end > n_tokens * STREAM_HEAD_SHARE and (
                at.state(Tier.HOST) is Residency.ABSENT or at.state(Tier.DISK) is Residency.RESIDENT
            ):
                assert at.parent is not None
                at = at.parent
        return at

    def _copy(self, job: HostWrite) -> int:
        context, size = self._context, self._context.page_size
        wait_for(job.after)
        self.to_host.restart_clock()
        page_bytes = context.copier.page_format.page_bytes
        for part in context.pacer.portions(job.n_pages, page_bytes):
            slots = job.device_slots[part.start * size : part.stop * size]
            with context.pacer.turn((part.stop - part.start) * page_bytes) as held_up_s:
                self.to_host.exclude(held_up_s)
                context.copier.to_host(slots, job.host_pages[part], job.after)
        return job.n_pages

    def host_written(self, completion: Completion[HostWrite]) -> None:
        context, job = self._context, completion.job
        context.forest.unpin(job.node, Tier.DEVICE)
        if completion.n_done < job.n_pages:
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
        for node in self._host_deferred.nodes():
            at: Node | None = node
            while at is not None and at is not failed:
                at = at.parent
            if at is failed:
                self._host_deferred.discard(node)

    # -- host -> disk -------------------------------------------------------------------------

    def _start_disk_writes(self) -> None:
        limit = max(1, int(self._context.host.n_pages * DISK_WRITE_SHARE))
        while self._disk_deferred:
            in_flight = self.to_disk.pages_in_flight
            node = self._disk_deferred.first()
            if in_flight and in_flight + node.n_pages > limit:
                return
            self._disk_deferred.discard(node)
            for part in self._undurable_path(node):
                self._start_disk_write(part)

    @staticmethod
    def _undurable_path(node: Node) -> list[Node]:
        path = []
        at: Node | None = node
        while (
            at is not None
            and not at.is_root
            and at.state(Tier.HOST) is Residency.RESIDENT
            and at.state(Tier.DISK) is Residency.ABSENT
        ):
            path.append(at)
            at = at.parent
        return path[::-1]

    def _start_disk_write(self, node: Node) -> None:
        context = self._context
        if context.disk is None:
            return
        op = context.next_op()
        host_pages = host_pages_of(node)
        context.forest.start_transfer(node, Tier.DISK, Residency.WRITING_BACK, None, op)
        context.forest.pin(node, Tier.HOST)
        hashes, above = list(node.page_hashes), _hashes_above(node)
        self.to_disk.submit(DiskWrite(op, context.disk, node, hashes, host_pages, above))

    def _write(self, job: DiskWrite) -> int:
        job.disk.touch(chain.from_iterable(job.above))
        context = self._context
        page_bytes = context.page_format(Tier.DISK).page_bytes
        for part in context.pacer.portions(job.n_pages, page_bytes):
            with context.pacer.turn((part.stop - part.start) * page_bytes) as held_up_s:
                self.to_disk.exclude(held_up_s)
                job.disk.write_pages(job.hashes[part], context.host.views(job.host_pages[part]))
        return job.disk.count_prefix(job.hashes)

    def disk_written(self, completion: Completion[DiskWrite]) -> None:
        context, job = self._context, completion.job
        context.forest.unpin(job.node, Tier.HOST)
        if completion.n_done < job.n_pages:
            # The tier is degraded or full: the pages stay where they are, and are tried again when
            # they are used the next time.
            context.forest.abort_transfer(job.op, Tier.DISK)
            return
        nodes = context.forest.finish_transfer(job.op, Tier.DISK)
        context.transferred(Tier.HOST, Tier.DISK, completion)
        context.stored(nodes, Tier.DISK)


def _hashes_above(node: Node) -> tuple[list[bytes], ...]:
    """Page hashes of the nodes above, by node: whoever adds to a prefix uses it."""
    above = []
    at = node.parent
    while at is not None and not at.is_root:
        above.append(at.page_hashes)
        at = at.parent
    return tuple(above)
