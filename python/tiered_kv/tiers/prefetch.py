"""Disk -> host, ahead of admission: while a request waits, its pages come nearer.

A lookup that misses costs one hash and one dictionary probe. Requests that need a page already on
its way share that transfer. The pages a request waits for stay pinned on the host until it is
admitted or gone, within a bounded share of the pool; beyond it, requests queue here in order.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import cast

from tiered_kv.core.ids import Tier
from tiered_kv.forest.key import page_hashes
from tiered_kv.forest.node import Node
from tiered_kv.forest.residency import Residency
from tiered_kv.tiers.context import TierContext
from tiered_kv.tiers.disk.namespace import DiskNamespace
from tiered_kv.tiers.slots import PageIds
from tiered_kv.tiers.transfer import Completion, TransferQueue

#: Pages held for waiting requests may take at most this share of the host pool: the rest keeps
#: taking what is being computed.
HELD_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class DiskRead:
    op: int
    disk: DiskNamespace
    last: Node
    hashes: list[bytes]
    host_pages: PageIds

    @property
    def n_pages(self) -> int:
        return len(self.hashes)


@dataclass(slots=True)
class Ticket:
    """What one request waits for: the tree `root`, its prompt's whole pages, and transfers."""

    root: Node
    tokens: array[int]
    started: bool = False
    waiting_for: set[int] = field(default_factory=set)
    pinned: Node | None = None
    n_loaded_tokens: int = 0


class Prefetch:
    """Tickets by request id; the scheduler's thread asks `done(rid)` before it admits."""

    def __init__(self, context: TierContext) -> None:
        self._context = context
        self.queue: TransferQueue[DiskRead] = TransferQueue("disk-to-host", self._read)
        self._tickets: dict[str, Ticket] = {}
        self._queued: dict[str, None] = {}
        self._n_held = 0
        # What was held when the first in the queue found no room: it needs less to be.
        self._n_held_when_full: int | None = None

    @property
    def tickets(self) -> dict[str, Ticket]:
        return self._tickets

    # -- the request's life -------------------------------------------------------------------

    def request(self, rid: str, anchor: Node, tokens: array[int]) -> None:
        """`rid` needs `tokens` after `anchor`, the last node it can use now: look below."""
        size = self._context.page_size
        if self._context.disk is None or rid in self._tickets or len(tokens) < size:
            return
        if not self._may_hit(anchor, tokens[:size]):
            return
        root, prompt = _prompt_of(anchor, tokens)
        self._tickets[rid] = Ticket(root, prompt[: len(prompt) // size * size])
        self._queued[rid] = None
        self._start_queued()

    def _may_hit(self, anchor: Node, first: array[int]) -> bool:
        if first.tobytes() in anchor.children:
            return True  # on its way for another request
        assert self._context.disk is not None
        (hit,) = self._context.collective.minimum(
            [self._context.disk.contains(self._next_hash(anchor.last_page_hash, first))]
        )
        return bool(hit)

    def done(self, rid: str) -> bool:
        """True when nothing is on its way for this request (any more)."""
        ticket = self._tickets.get(rid)
        return ticket is None or (ticket.started and not ticket.waiting_for)

    def loaded_tokens(self, rid: str) -> int:
        """Tokens that were brought from disk to host for this request."""
        ticket = self._tickets.get(rid)
        return ticket.n_loaded_tokens if ticket is not None else 0

    def release(self, rid: str) -> None:
        """The request has been admitted, or is gone: its pages are ordinary cache from now on."""
        ticket = self._tickets.pop(rid, None)
        if ticket is None:
            return
        if rid in self._queued:
            del self._queued[rid]
            self._n_held_when_full = None
        self._let_go(ticket)

    def _hold(self, ticket: Ticket, pinned: Node, n_loaded_tokens: int) -> None:
        ticket.pinned, ticket.n_loaded_tokens = pinned, n_loaded_tokens
        self._n_held += n_loaded_tokens // self._context.page_size

    def _let_go(self, ticket: Ticket) -> None:
        if ticket.pinned is not None:
            self._context.forest.unpin(ticket.pinned, Tier.HOST)
            self._n_held -= ticket.n_loaded_tokens // self._context.page_size
        ticket.pinned, ticket.n_loaded_tokens = None, 0

    def clear(self) -> None:
        for rid in list(self._tickets):
            self.release(rid)

    def advance(self) -> None:
        if self._queued:
            self._start_queued()

    # -- starting -----------------------------------------------------------------------------

    def _start_queued(self) -> None:
        if self._n_held_when_full is not None and self._n_held >= self._n_held_when_full:
            return
        self._n_held_when_full = None
        for rid in list(self._queued):
            if not self._start(self._tickets[rid]):
                self._n_held_when_full = self._n_held
                return
            del self._queued[rid]

    def _start(self, ticket: Ticket) -> bool:
        """False if there is no room to hold its pages yet; True when it need not queue longer."""
        context = self._context
        path = context.forest.match(ticket.root, ticket.tokens).path
        n_held = _count_held(path)
        last, n_loaded = ticket.root, 0
        for node in path[:n_held]:
            op = node.op(Tier.HOST)
            if op is not None and node.state(Tier.HOST) is Residency.LOADING:
                ticket.waiting_for.add(op)
                n_loaded += node.n_tokens
            last = node
        rest = ticket.tokens[last.end : _end_of_hole(path[n_held:], len(ticket.tokens))]
        hashes = self._stored_prefix(last, rest)
        budget = max(1, int(context.host.n_pages * HELD_SHARE)) - self._n_held
        if len(hashes) > budget and self._n_held > 0:
            ticket.waiting_for.clear()
            return False
        if hashes:
            parent, last = last, self._read_from_disk(ticket, last, rest, hashes[:budget])
            n_loaded += last.end - parent.end
        if n_loaded:
            context.forest.pin(last, Tier.HOST)
            self._hold(ticket, last, n_loaded)
        ticket.started = True
        return True

    def _next_hash(self, parent_hash: bytes, page: array[int]) -> bytes:
        return page_hashes(parent_hash, page, self._context.page_size)[0]

    def _stored_prefix(self, parent: Node, tokens: array[int]) -> list[bytes]:
        """The hashes of the leading pages of `tokens` that the disk has (on every rank)."""
        context = self._context
        hashes: list[bytes] = []
        if context.disk is None:  # suspended since the request came
            return hashes
        parent_hash, size = parent.last_page_hash, context.page_size
        for at in range(0, len(tokens), size):
            parent_hash = self._next_hash(parent_hash, tokens[at : at + size])
            if not context.disk.contains(parent_hash):
                break
            hashes.append(parent_hash)
        (n,) = context.collective.minimum([len(hashes)])
        return hashes[:n]

    def _read_from_disk(
        self, ticket: Ticket, parent: Node, tokens: array[int], hashes: list[bytes]
    ) -> Node:
        """Reserves host pages, grows the tree by LOADING nodes and starts reading into them."""
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
        run = tokens[: len(hashes) * context.page_size]
        nodes = context.forest.extend(parent, run, Tier.HOST, Residency.LOADING, host_pages, op)
        last = nodes[-1]
        context.forest.pin(last, Tier.HOST)
        ticket.waiting_for.add(op)
        assert context.disk is not None
        self.queue.submit(DiskRead(op, context.disk, last, hashes, host_pages))
        return last

    def _read(self, job: DiskRead) -> int:
        return job.disk.read_pages(job.hashes, self._context.host.views(job.host_pages))

    # -- finishing ----------------------------------------------------------------------------

    def finished(self, completion: Completion[DiskRead]) -> None:
        """The leading pages that arrived become readable; the rest are a miss, and computed."""
        context, job = self._context, completion.job
        nodes, lost = context.forest.finish_leading(job.op, Tier.HOST, completion.n_done)
        for node in nodes:
            if node.state(Tier.DISK) is Residency.ABSENT:
                context.forest.set_resident(node, Tier.DISK)
        for node, slots in lost:
            context.host.free(cast(PageIds, slots))
            if node.state(Tier.DISK) is Residency.RESIDENT:
                # So that it is written again when it is computed again.
                context.forest.evict(node, Tier.DISK)
        for ticket in self._tickets.values():
            if job.op in ticket.waiting_for:
                ticket.waiting_for.discard(job.op)
                self._shorten(ticket, {node for node, _ in lost})
        context.forest.unpin(job.last, Tier.HOST)
        self._observe(completion)
        context.stored(nodes, Tier.HOST)

    def _shorten(self, ticket: Ticket, lost: set[Node]) -> None:
        """Nothing below a page that did not come can be used: hold only what is above it."""
        keep, at = ticket.pinned, ticket.pinned
        while at is not None and lost:
            if at in lost:
                keep = at.parent
            at = at.parent
        if ticket.pinned is None or keep is None or keep is ticket.pinned:
            return
        n_loaded = max(0, ticket.n_loaded_tokens - (ticket.pinned.end - keep.end))
        if n_loaded:
            self._context.forest.pin(keep, Tier.HOST)
        self._let_go(ticket)
        if n_loaded:
            self._hold(ticket, keep, n_loaded)

    def _observe(self, completion: Completion[DiskRead]) -> None:
        n_bytes = completion.n_done * self._context.copier.page_format.page_bytes
        self._context.observer.transferred(
            Tier.DISK, Tier.HOST, completion.n_done, n_bytes, completion.seconds
        )


def _count_held(path: tuple[Node, ...]) -> int:
    """How many leading nodes the device or the host has, or is about to have."""
    for position, node in enumerate(path):
        host = node.state(Tier.HOST) in (Residency.RESIDENT, Residency.LOADING)
        if not host and node.state(Tier.DEVICE) is Residency.ABSENT:
            return position
    return len(path)


def _end_of_hole(nodes: tuple[Node, ...], end: int) -> int:
    """Where the host has pages again, below a part that failed to be copied or read; or `end`."""
    for node in nodes:
        if node.state(Tier.HOST) is not Residency.ABSENT:
            return node.start
    return end


def _prompt_of(node: Node, tokens: array[int]) -> tuple[Node, array[int]]:
    """The root above `node`, and all tokens from there: those of the path, then `tokens`."""
    path = []
    at = node
    while at.parent is not None:
        path.append(at.tokens)
        at = at.parent
    prompt = array("q")
    for run in reversed(path):
        prompt.extend(run)
    prompt.extend(tokens)
    return at, prompt
