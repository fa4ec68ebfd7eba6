"""Disk -> host, ahead of admission: while a request waits, its pages come nearer.

A lookup that misses costs one hash and one dictionary probe; a long prompt that hits is hashed and
looked up on a thread of its own. Requests that need a page already on its way share that transfer.
How much is read, and how long a request waits for it, is for the costs to say. The pages a request
waits for stay pinned on the host until it is admitted or gone, within a bounded share of the pool;
beyond it, requests queue here in order. What nobody waits for any more is not read on.
"""

from __future__ import annotations

import time
from array import array
from dataclasses import dataclass, field
from typing import cast

from tiered_kv.core.ids import Tier
from tiered_kv.forest.key import page_hashes
from tiered_kv.forest.node import Node
from tiered_kv.forest.residency import Residency
from tiered_kv.tiers.context import Epoch, TierContext
from tiered_kv.tiers.disk_lookup import DiskLookup, Stored, look_up, prompt_of
from tiered_kv.tiers.disk_pages import DiskPages
from tiered_kv.tiers.slots import PageIds
from tiered_kv.tiers.timeline import DISK_READS, REQUESTS
from tiered_kv.tiers.transfer import Completion, TransferQueue, Wanted

#: Pages held for waiting requests may take at most this share of the host pool: the rest keeps
#: taking what is being computed.
HELD_SHARE = 0.5
#: Up to this many pages are hashed and looked up at once, on the scheduler's thread: a few
#: microseconds each, where a thread's answer comes a scheduling pass later.
INLINE_LOOKUP_PAGES = 32
#: Between stretches of this many pages, a read looks whether it is still wanted.
READ_STRETCH_PAGES = 64


@dataclass(frozen=True, slots=True)
class DiskRead:
    op: int
    disk: DiskPages
    last: Node
    hashes: list[bytes]
    host_pages: PageIds
    wanted: Wanted
    epoch: Epoch

    @property
    def n_pages(self) -> int:
        return len(self.hashes)


@dataclass(slots=True)
class Ticket:
    """What one request waits for: the tree `root`, its prompt's whole pages, and transfers."""

    root: Node
    tokens: array[int]
    prompt_tokens: int = 0
    started: bool = False
    stored: Stored | None = None
    waiting_for: set[int] = field(default_factory=set)
    patience_s: float = float("inf")
    waits_since_s: float | None = None
    pinned: Node | None = None
    n_loaded_tokens: int = 0
    asked_s: float = field(default_factory=time.perf_counter)
    is_drawn: bool = False


class Prefetch:
    """Tickets by request id; the scheduler's thread asks `done(rid)` before it admits."""

    def __init__(self, context: TierContext) -> None:
        self._context = context
        self.queue: TransferQueue[DiskRead] = TransferQueue("disk-to-host", self._read)
        self.lookups: TransferQueue[DiskLookup] = TransferQueue("disk-lookup", look_up)
        self._reads: dict[int, Wanted] = {}
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
        root, prompt = prompt_of(anchor, tokens)
        n_tokens = len(prompt)
        del prompt[n_tokens // size * size :]
        ticket = Ticket(root, prompt, n_tokens)
        self._tickets[rid] = ticket
        if (len(ticket.tokens) - anchor.end) // size > INLINE_LOOKUP_PAGES:
            self._submit_lookup(rid, ticket, anchor.end // size)
        else:
            self._enqueue(rid)

    def _submit_lookup(self, rid: str, ticket: Ticket, first_page: int) -> None:
        assert self._context.disk is not None
        disk, page_size = self._context.disk, self._context.page_size
        root_hash = ticket.root.last_page_hash
        self.lookups.submit(
            DiskLookup(rid, disk, root_hash, ticket.tokens, page_size, first_page, [])
        )

    def looked_up(self, completion: Completion[DiskLookup]) -> None:
        """A lookup is done: start what its request needs, unless that has gone."""
        job = completion.job
        ticket = self._tickets.get(job.rid)
        # Another request may have come with the same name: tickets are told by their tokens.
        if ticket is None or ticket.tokens is not job.tokens:
            return
        end = job.first_page + completion.n_done
        # A lookup that failed leaves the list empty.
        if len(job.hashes) >= end:
            ticket.stored = Stored(job.first_page, end, job.hashes)
        else:
            ticket.stored = Stored(job.first_page, job.first_page, [])
        self._enqueue(job.rid)

    def _enqueue(self, rid: str) -> None:
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
        if ticket is None:
            return True
        is_done = ticket.started and not ticket.waiting_for
        timeline = self._context.timeline
        if is_done and timeline is not None and not ticket.is_drawn:
            ticket.is_drawn = True
            now_s = time.perf_counter()
            timeline.span(REQUESTS, rid, ticket.asked_s, now_s, tokens=ticket.n_loaded_tokens)
        return is_done

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
        still_wanted = set().union(*(other.waiting_for for other in self._tickets.values()))
        for op in ticket.waiting_for - still_wanted:
            if op in self._reads:
                self._reads[op].by_anyone = False

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
        if self._reads:
            self._lose_patience()

    def _lose_patience(self) -> None:
        """Requests that have waited longer than computing would take wait no more.

        By the time that ranks agree on. What is on its way still arrives, for whoever comes next.
        """
        now_s = self._context.now_s
        for ticket in self._tickets.values():
            if not ticket.waiting_for:
                continue
            if ticket.waits_since_s is None:
                ticket.waits_since_s = now_s
            elif now_s - ticket.waits_since_s > ticket.patience_s:
                ticket.waiting_for.clear()
                self._let_go(ticket)

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
        hashes = self._worth_reading(ticket, last, self._stored_prefix(ticket, last, rest))
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
            ticket.patience_s = context.manager.patience_s(
                n_loaded // context.page_size, last.end - n_loaded, self._queued_bytes
            )
        ticket.started = True
        return True

    @property
    def _queued_bytes(self) -> int:
        return self.queue.pages_in_flight * self._context.page_format(Tier.DISK).page_bytes

    def _worth_reading(self, ticket: Ticket, parent: Node, hashes: list[bytes]) -> list[bytes]:
        """The leading part of what the disk has that is sooner read than computed."""
        if not hashes:
            return hashes
        n_pages = self._context.manager.pages_from_disk(
            len(hashes), parent.end, ticket.prompt_tokens, queued_bytes=self._queued_bytes
        )
        return hashes[:n_pages]

    def _next_hash(self, parent_hash: bytes, page: array[int]) -> bytes:
        return page_hashes(parent_hash, page, self._context.page_size)[0]

    def _stored_prefix(self, ticket: Ticket, parent: Node, tokens: array[int]) -> list[bytes]:
        """The hashes of the leading pages of `tokens` that the disk has (on every rank)."""
        context = self._context
        hashes: list[bytes] = []
        if context.disk is None:  # suspended since the request came
            return hashes
        if ticket.stored is not None:
            first = parent.end // context.page_size
            if first < ticket.stored.first:  # what was above has left the host meanwhile
                return hashes
            n_pages = len(tokens) // context.page_size
            return ticket.stored.hashes[first : min(ticket.stored.end, first + n_pages)]
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
        wanted = self._reads[op] = Wanted()
        self.queue.submit(
            DiskRead(op, context.disk, last, hashes, host_pages, wanted, context.epoch)
        )
        return last

    def _read(self, job: DiskRead) -> int:
        timeline = self._context.timeline
        views = self._context.host.views(job.host_pages)
        for at in range(0, job.n_pages, READ_STRETCH_PAGES):
            if not job.wanted.by_anyone:
                return at
            stretch = slice(at, at + READ_STRETCH_PAGES)
            hashes = job.hashes[stretch]
            began_s = time.perf_counter()
            n_read = job.disk.read_pages(hashes, views[stretch])
            if timeline is not None:
                now_s = time.perf_counter()
                timeline.span(DISK_READS, f"{n_read} pages", began_s, now_s, op=job.op)
            if n_read < len(hashes):
                return at + n_read
        return job.n_pages

    # -- finishing ----------------------------------------------------------------------------

    def finished(self, completion: Completion[DiskRead]) -> None:
        """The leading pages that arrived become readable; the rest are a miss, and computed."""
        context, job = self._context, completion.job
        was_wanted = self._reads.pop(job.op).by_anyone
        if job.epoch.flushes != context.epoch.flushes:
            context.host.free(job.host_pages)
            return
        nodes, lost = context.forest.finish_leading(job.op, Tier.HOST, completion.n_done)
        for node in nodes:
            if node.state(Tier.DISK) is Residency.ABSENT and job.epoch == context.epoch:
                context.forest.set_resident(node, Tier.DISK)
        for node, slots in lost:
            context.host.free(cast(PageIds, slots))
            if was_wanted and node.state(Tier.DISK) is Residency.RESIDENT:
                # So that it is written again when it is computed again.
                context.forest.evict(node, Tier.DISK)
        for ticket in self._tickets.values():
            if job.op in ticket.waiting_for:
                ticket.waiting_for.discard(job.op)
                self._shorten(ticket, {node for node, _ in lost})
        context.forest.unpin(job.last, Tier.HOST)
        context.transferred(Tier.DISK, Tier.HOST, completion)
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
