"""Write-through from the host to one cold store, behind everything else.

What is written next is for `memory.write_through` to say. A flush waits for no store: what is on
the host and not in the store yet keeps its host pages, belongs to no node any more, and is written
behind, for a limited time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

from tiered_kv.core.ids import Tier
from tiered_kv.forest.node import Node
from tiered_kv.forest.residency import Residency
from tiered_kv.memory.back_off import BackOff
from tiered_kv.memory.write_through import StoreWrites
from tiered_kv.tiers.context import Epoch, TierContext, host_pages_of
from tiered_kv.tiers.page_store import PageStore
from tiered_kv.tiers.slots import PageIds
from tiered_kv.tiers.transfer import Completion, TransferQueue, Wanted

#: What a flush found on the host may be written for so long.
BEHIND_FLUSH_S = 30.0


@dataclass(frozen=True, slots=True)
class ColdWrite:
    op: int
    store: PageStore
    node: Node
    hashes: list[bytes]
    host_pages: PageIds
    above: tuple[list[bytes], ...]
    epoch: Epoch
    wanted: Wanted

    @property
    def n_pages(self) -> int:
        return len(self.hashes)


class ColdWrites:
    """store: where to write now; None while what is computed has no name, or the tier is away.

    share: see `StoreWrites`.
    """

    def __init__(
        self,
        context: TierContext,
        tier: Tier,
        store: Callable[[], PageStore | None],
        share: float,
    ) -> None:
        self._context = context
        self.tier = tier
        self._store = store
        name = f"host-to-{tier.name.lower()}"
        self.queue: TransferQueue[ColdWrite] = TransferQueue(name, self._write)
        self._next = StoreWrites(context.forest, context.manager, tier, context.host.n_pages, share)
        self._back_off = BackOff()
        """A shared store that refused something is offered it again after a while."""

    @property
    def n_deferred(self) -> int:
        return len(self._next.waiting)

    @property
    def wants_time(self) -> bool:
        """Whether something waits for a time to come: the same on every rank."""
        return bool(self._next.waiting) and not self._back_off.is_well

    def offer(self, nodes: Sequence[Node]) -> None:
        """`nodes`, of one tree, are to be in the store as well if they are readable on the host."""
        if self._store() is None or not nodes or not nodes[0].root.tree_key.is_lasting:
            return
        self._next.offer(nodes)
        self._start()

    def advance(self) -> None:
        """Starts what had to wait, as far as there is room now."""
        if self._next.waiting:
            self._start()

    def evicted(self, node: Node, parent: Node, tier: Tier) -> None:
        """A node has left a tier."""
        self._next.evicted(node, parent, tier)

    def hand_over(self) -> list[PageIds]:
        """The tree is about to be emptied: starts what had to wait.

        Returns the host pages of all on their way: they stay until that is acknowledged.
        """
        self._start(limit_pages=self._context.host.n_pages)
        until_s = time.monotonic() + BEHIND_FLUSH_S
        for job in self.queue.open_jobs:
            job.wanted.until_s = min(job.wanted.until_s, until_s)
        return [job.host_pages for job in self.queue.open_jobs]

    def leave(self) -> None:
        """This server ends, and what it holds is of use to others: see `StoreWrites.leave`."""
        if self._store() is not None:
            self._next.leave()
            self._start()

    def forget(self) -> None:
        """What is on its way to the store is not written, or has been for nothing."""
        for job in self.queue.open_jobs:
            job.wanted.by_anyone = False

    def _start(self, limit_pages: int | None = None) -> None:
        if limit_pages is None and not self._back_off.is_over(self._context.now_s):
            return
        while (path := self._next.take(self.queue.pages_in_flight, limit_pages)) is not None:
            for node in path:
                self._start_write(node)

    def _start_write(self, node: Node) -> None:
        context, store = self._context, self._store()
        if store is None:
            return
        op = context.next_op()
        host_pages = host_pages_of(node)
        context.forest.start_transfer(node, self.tier, Residency.WRITING_BACK, None, op)
        context.forest.pin(node, Tier.HOST)
        hashes, above = list(node.page_hashes), _hashes_above(node, self.tier)
        epoch, wanted = context.epoch, Wanted()
        self.queue.submit(ColdWrite(op, store, node, hashes, host_pages, above, epoch, wanted))

    def _write(self, job: ColdWrite) -> int:
        if job.wanted.is_over():
            return 0
        job.store.touch(chain.from_iterable(job.above))
        context, n_stored = self._context, 0
        page_bytes = job.store.traits.page_format.page_bytes
        for part in context.pacer.portions(job.n_pages, page_bytes):
            if job.wanted.is_over() or n_stored < part.start:
                break
            with context.pacer.turn((part.stop - part.start) * page_bytes) as held_up_s:
                self.queue.exclude(held_up_s)
                n_stored += job.store.put(
                    job.hashes[part], context.host.views(job.host_pages[part])
                )
        return n_stored

    def written(self, completion: Completion[ColdWrite]) -> None:
        context, job = self._context, completion.job
        context.forest.unpin(job.node, Tier.HOST)
        has_arrived = completion.n_done == job.n_pages and job.wanted.by_anyone
        is_tried_again = job.store.traits.is_shared and job.wanted.by_anyone
        is_tried_again &= job.epoch.flushes == context.epoch.flushes
        if not (has_arrived or is_tried_again):
            context.observer.unwritten(self.tier, job.n_pages)
        if job.epoch.flushes != context.epoch.flushes:
            context.host.free(job.host_pages)
            return
        if not has_arrived:
            # The store is degraded or full: the pages stay where they are, and are tried again when
            # they are used the next time; those that others may wait for, after a while.
            context.forest.abort_transfer(job.op, self.tier)
            if is_tried_again:
                self._next.again(job.node)
                self._back_off.failed(context.now_s)
            return
        self._back_off.worked()
        nodes = context.forest.finish_transfer(job.op, self.tier)
        context.transferred(Tier.HOST, self.tier, completion)
        context.stored(nodes, self.tier)


def _hashes_above(node: Node, tier: Tier) -> tuple[list[bytes], ...]:
    """Page hashes of the nodes above that the store has: whoever adds to a prefix uses it."""
    above = []
    at = node.parent
    while at is not None and not at.is_root:
        if at.state(tier) is Residency.RESIDENT:
            above.append(at.page_hashes)
        at = at.parent
    return tuple(above)
