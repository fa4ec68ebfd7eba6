"""Disk -> host, ahead of admission: while a request waits, its pages come nearer.

A lookup that misses costs one hash and one dictionary probe; a long prompt that hits is hashed and
looked up on a thread of its own. Requests that need a page already on its way share that transfer.
How much is read is for the costs to say; who is read for first, and who finds room on the host, for
`scheduler.read_order`. A request's pages stay there until it is admitted or gone, or a more urgent
one needs the room. What nobody needs any more is not read on.

A request is kept from running while it is looked up or read for, as long as its patience lasts. It
is not while it stands in line: if its turn to run comes before, it is computed.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from tiered_kv.core.ids import Tier
from tiered_kv.forest.key import page_hash, page_hashes
from tiered_kv.forest.node import Node
from tiered_kv.memory.probes import PROBE_PAGES
from tiered_kv.scheduler.read_order import ReadOrder, Urgency
from tiered_kv.tiers.context import TierContext
from tiered_kv.tiers.disk_lookup import DiskLookup, Stored, look_up, prompt_of
from tiered_kv.tiers.held_reads import HeldReads
from tiered_kv.tiers.read_queue import DiskRead, ReadQueue
from tiered_kv.tiers.ticket import (
    Ticket,
    count_held,
    end_of_hole,
    is_coming,
    pages_on_host,
)
from tiered_kv.tiers.timeline import REQUESTS
from tiered_kv.tiers.transfer import Completion, TransferQueue

#: Pages held for waiting requests may take at most this share of the host pool: the rest keeps
#: taking what is being computed.
HELD_SHARE = 0.5
#: Up to this many pages are hashed and looked up at once, on the scheduler's thread: a few
#: microseconds each, where a thread's answer comes a scheduling pass later.
INLINE_LOOKUP_PAGES = 32
#: Of those in line, so many are looked at for one that finds room.
LINE_LOOK = 8
#: Reads that may be under way at once.
READS_MAX = 256


@dataclass(frozen=True, slots=True)
class _Wish:
    """What a ticket would hold and have read now."""

    path: tuple[Node, ...]
    """Nodes that device or host have, or are about to have."""
    hashes: list[bytes]
    """Of the pages to read after those."""


class Prefetch:
    """Tickets by request id; the scheduler's thread asks `done(rid)` before it admits."""

    def __init__(self, context: TierContext) -> None:
        self._context = context
        self.lookups: TransferQueue[DiskLookup] = TransferQueue("disk-lookup", look_up)
        self.urgency_of: Callable[[str], Urgency | None] = lambda _: None
        """By request id: whose pages come first. Of whom it does not know, those who came first."""
        n_pages = context.host.n_pages
        self._order = ReadOrder(n_pages, int(n_pages * HELD_SHARE), self._urgency)
        self._reads = HeldReads(context, self._order)
        self._tickets: dict[str, Ticket] = {}
        self._n_asked = 0
        self._new: list[Ticket] = []
        self._news: dict[str, None] = {}
        # Nobody of those looked at in line found room, and nothing has changed since.
        self._is_full = False

    @property
    def queue(self) -> ReadQueue:
        return self._reads.queue

    @property
    def tickets(self) -> dict[str, Ticket]:
        return self._tickets

    @property
    def wants_time(self) -> bool:
        """Whether the next poll must agree on the time: the same on every rank."""
        return bool(self._new)

    # -- the request's life -------------------------------------------------------------------

    def request(
        self, rid: str, anchor: Node, tokens: array[int], *, is_ahead: bool = False
    ) -> None:
        """`rid` needs `tokens` after `anchor`, the last node it can use now: look below.

        It is read for at the next poll, when those who came with it are known, too. is_ahead: it is
        only expected, so its pages come after all others'.
        """
        context, size = self._context, self._context.page_size
        if context.disk is None or rid in self._tickets or len(tokens) < size:
            return
        if not self._may_hit(anchor, tokens[:size]):
            return
        root, prompt = prompt_of(anchor, tokens)
        n_tokens = len(prompt)
        del prompt[n_tokens // size * size :]
        self._n_asked += 1
        ticket = self._tickets[rid] = Ticket(rid, root, prompt, n_tokens, self._n_asked, is_ahead)
        n_pages = (len(prompt) - anchor.end) // size
        ticket.patience_s = context.manager.patience_s(
            n_pages, anchor.end, self._bytes_before(ticket)
        )
        self._new.append(ticket)
        self._look_up(ticket, anchor)

    def _may_hit(self, anchor: Node, first: array[int]) -> bool:
        if first.tobytes() in anchor.children:
            return True  # on its way for another request
        disk = self._context.disk
        assert disk is not None
        is_there = disk.contains(page_hash(anchor.last_page_hash, first))
        (hit,) = self._context.collective.minimum([is_there])
        return bool(hit)

    def _look_up(self, ticket: Ticket, anchor: Node) -> None:
        """Find out what the disk has of its prompt after `anchor`."""
        context, size = self._context, self._context.page_size
        assert context.disk is not None
        first = anchor.end // size
        if len(ticket.tokens) // size - first > INLINE_LOOKUP_PAGES:
            ticket.is_looked_up = False
            self._news[ticket.name] = None
            root_hash, disk = ticket.root.last_page_hash, context.disk
            self.lookups.submit(
                DiskLookup(ticket.name, disk, root_hash, ticket.tokens, size, first, [])
            )
            return
        hashes = page_hashes(anchor.last_page_hash, ticket.tokens[anchor.end :], size)
        (n,) = context.collective.minimum([context.disk.count_prefix(hashes)])
        self._stand_in_line(ticket, Stored(first, first + n, hashes, first))

    def looked_up(self, completion: Completion[DiskLookup]) -> None:
        """A lookup is done: its request stands in line, unless it has gone."""
        job = completion.job
        ticket = self._tickets.get(job.rid)
        # Another request may have come with the same name: tickets are told by their tokens.
        if ticket is None or ticket.tokens is not job.tokens:
            return
        end = job.first_page + completion.n_done
        # A lookup that failed leaves the list empty.
        if len(job.hashes) < end:
            end = job.first_page
        self._stand_in_line(ticket, Stored(job.first_page, end, job.hashes))

    def _stand_in_line(self, ticket: Ticket, stored: Stored | None) -> None:
        ticket.stored, ticket.is_looked_up = stored, True
        self._order.wait(ticket.name)
        self._news[ticket.name] = None
        self._is_full = False

    def done(self, rid: str) -> bool:
        """True when nothing is under way for this request that it should wait for (any more)."""
        ticket = self._tickets.get(rid)
        if ticket is None:
            return True
        if ticket.waits:
            return False
        timeline = self._context.timeline
        if timeline is not None and ticket.pinned is not None and not ticket.is_drawn:
            ticket.is_drawn = True
            now_s = time.perf_counter()
            timeline.span(REQUESTS, rid, ticket.began_s, now_s, tokens=ticket.came_tokens)
        return True

    def is_settled(self, rid: str) -> bool:
        """True when nothing more will come for this request."""
        ticket = self._tickets.get(rid)
        if ticket is None:
            return True
        return ticket.is_looked_up and not (ticket.waiting_for or self._order.is_in_line(rid))

    def arriving(self, rid: str) -> tuple[float, int]:
        """Of a request that waits: seconds until its pages should be there, and how many tokens."""
        ticket = self._tickets[rid]
        return ticket.ready_s - self._context.now_s, ticket.n_loaded_tokens

    def take_news(self) -> list[str]:
        """Requests of which `done` may say something else than before the last call."""
        news, self._news = list(self._news), {}
        return news

    def loaded_tokens(self, rid: str) -> int:
        """Tokens that were brought from disk to host for this request."""
        ticket = self._tickets.get(rid)
        return ticket.came_tokens if ticket is not None else 0

    def give_up(self, rid: str) -> None:
        """This request waits no longer. What is on its way still comes, until it is released."""
        ticket = self._tickets.get(rid)
        if ticket is not None:
            ticket.is_patient = False
            self._news[rid] = None

    def release(self, rid: str) -> None:
        """The request has been admitted, or is gone: its pages are ordinary cache from now on."""
        ticket = self._tickets.pop(rid, None)
        if ticket is not None:
            self._reads.let_go(ticket)
            self._order.drop(rid)
            self._news.pop(rid, None)
            self._is_full = False

    def clear(self) -> None:
        """Nothing is on its way for anybody any more; whoever was held is told so."""
        waited = list(self._tickets)
        for rid in waited:
            self.release(rid)
        self._news.update(dict.fromkeys(waited))

    # -- its turn -----------------------------------------------------------------------------

    def advance(self) -> None:
        """Once per poll: time has passed, and there may be room."""
        now_s = self._context.now_s
        for ticket in self._new:
            if self._tickets.get(ticket.name) is ticket:
                ticket.asked_s = now_s
                self._order.wait_until(ticket.name, now_s + ticket.patience_s)
                if self._order.is_in_line(ticket.name):
                    self._order.wait(ticket.name)  # how urgent it is may be known by now
        self._new.clear()
        for name in self._order.out_of_patience(now_s):
            self.give_up(name)
        if self._order.n_in_line and not self._is_full:
            self._serve_line()

    def _serve_line(self) -> None:
        """Read for those in line who find room, the most urgent first."""
        n_refused = 0
        while n_refused < LINE_LOOK and self.queue.in_flight < READS_MAX:
            names = self._order.first_in_line(n_refused + 1)
            if len(names) <= n_refused:
                break
            if not self._serve(self._tickets[names[n_refused]]):
                n_refused += 1
        self._is_full = n_refused == min(LINE_LOOK, self._order.n_in_line)

    def _serve(self, ticket: Ticket) -> bool:
        """False if there is no room for its pages: it stays in line."""
        order = self._order
        wish = self._wish(ticket)
        if wish is None:
            return True
        coming = [node for node in wish.path if is_coming(node)]
        known = pages_on_host(reversed(wish.path))
        hashes = wish.hashes[: max(order.room_pages - len(known), order.room_pages // 2)]
        if coming or hashes or ticket.is_displaced:
            known = known[: order.room_pages - len(hashes)]
            displaced = order.make_room(ticket.name, known, len(hashes))
            if displaced is None:
                return False
            for name in displaced:
                self._displace(self._tickets[name])
            self._start(ticket, wish.path, coming, hashes)
        order.leave_line(ticket.name)
        return True

    def _wish(self, ticket: Ticket) -> _Wish | None:
        """None if its prompt must be looked up again: what it went on from has left the host."""
        context, size = self._context, self._context.page_size
        found = context.forest.peek(ticket.root, ticket.tokens)
        known = tuple(found.path)
        if found.partial is not None:
            # What comes below must go on from where the prompt leaves the node.
            known = (*known, context.forest.split(found.partial, found.common // size)[0])
        path = known[: count_held(known)]
        last = path[-1] if path else ticket.root
        stored, first = ticket.stored, last.end // size
        if context.disk is None or stored is None:  # suspended since the request came
            return _Wish(path, [])
        if first < stored.first:
            self._order.leave_line(ticket.name)
            self._look_up(ticket, last)
            return None
        hole_end = end_of_hole(known[len(path) :], len(ticket.tokens))
        hashes = stored.between(first, hole_end // size)
        return _Wish(path, hashes[: self._worth_reading(ticket, len(hashes), last.end)])

    def _worth_reading(self, ticket: Ticket, n_pages: int, start: int) -> int:
        """How many of `n_pages` pages on disk, from token `start` of its prompt on, to read."""
        if not n_pages:
            return 0
        context = self._context
        ask = partial(
            context.manager.pages_from_disk,
            n_pages,
            start,
            ticket.prompt_tokens,
            queued_bytes=self._bytes_before(ticket),
        )
        n_wanted = ask()
        if not n_wanted and self._reads.probes.is_due(context.now_s):
            n_wanted = ask(least_pages=PROBE_PAGES)
            # To find out how long it takes; it is not kept waiting for that.
            ticket.is_patient = ticket.is_patient and not n_wanted
        return n_wanted

    def _start(
        self, ticket: Ticket, path: tuple[Node, ...], coming: list[Node], hashes: list[bytes]
    ) -> None:
        """Read for it what follows `path`, wait for what is `coming`, and keep all of it."""
        context, urgency = self._context, self._urgency(ticket.name)
        bytes_before = self._bytes_before(ticket)
        for node in coming:
            op = node.op(Tier.HOST)
            assert op is not None
            self._reads.join(ticket, op, urgency)
        parent = path[-1] if path else ticket.root
        last = self._reads.read(ticket, parent, hashes, urgency)
        n_loaded = last.end - parent.end + sum(node.n_tokens for node in coming)
        if n_loaded or ticket.is_displaced:
            self._reads.hold(ticket, last, n_loaded)
        if not ticket.waiting_for:
            return
        n_pages = n_loaded // context.page_size
        ticket.ready_s = context.now_s + context.manager.read_s(n_pages, bytes_before)
        ticket.patience_s = context.manager.patience_s(n_pages, last.end - n_loaded, bytes_before)
        if ticket.asked_s + ticket.patience_s < context.now_s:
            ticket.is_patient = False
        else:
            self._order.wait_until(ticket.name, ticket.asked_s + ticket.patience_s)
        self._news[ticket.name] = None

    def _displace(self, ticket: Ticket) -> None:
        """A more urgent one needs its room: it stands in line again, and may run meanwhile."""
        self._reads.let_go(ticket)
        ticket.is_displaced = True
        self._order.wait(ticket.name)
        self._news[ticket.name] = None

    def _urgency(self, name: str) -> Urgency:
        ticket = self._tickets[name]
        if ticket.is_ahead:
            return float("inf"), ticket.number
        return self.urgency_of(name) or (0.0, ticket.number)

    def _bytes_before(self, ticket: Ticket) -> int:
        """What comes from the disk before a read for it would."""
        n_pages = self.queue.pages_before(self._urgency(ticket.name))
        return n_pages * self._context.page_format(Tier.DISK).page_bytes

    def finished(self, completion: Completion[DiskRead]) -> None:
        """A read is done, as far as it came."""
        self._reads.finished(completion, self._heard)
        self._is_full = False

    def _heard(self, ticket: Ticket) -> None:
        self._news[ticket.name] = None
