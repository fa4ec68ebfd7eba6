"""Cold stores -> host, ahead of admission: while a request waits, its pages come nearer.

Requests that need a page already on its way share that transfer. How much is read is for the costs
to say; who is read for first, and who finds room on the host, for `ReadOrder`. A request's pages
stay there until it is admitted or gone, or a more urgent one needs the room. What nobody needs any
more is not read on.

A request is kept from running while it is looked up or read for, as long as its patience lasts. It
is not while it stands in line: if its turn to run comes before, it is computed.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from functools import partial

from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.node import Node
from tiered_kv.memory.cold_source import ColdSource, HostRoom, StoreLookups, UrgencyOf
from tiered_kv.memory.held_reads import HeldReads
from tiered_kv.memory.probes import PROBE_PAGES
from tiered_kv.memory.read_order import ReadOrder, Urgency
from tiered_kv.memory.stored_pages import Stored, prompt_of
from tiered_kv.memory.ticket import (
    Ticket,
    Wish,
    count_held,
    end_of_hole,
    is_coming,
    pages_on_host,
    usable,
)

#: Pages held for waiting requests may take at most this share of the host pool: the rest keeps
#: taking what is being computed.
HELD_SHARE = 0.5
#: Of those in line, so many are looked at for one that finds room.
LINE_LOOK = 8
#: Reads that may be under way at once.
READS_MAX = 256


class PrefetchPlanner:
    """Tickets by request id; the scheduler's thread asks `done(rid)` before it admits.

    sources: where to look, the nearest first. pages_per_unit: of the server's, in one page here."""

    def __init__(
        self,
        forest: Forest,
        room: HostRoom,
        lookups: StoreLookups,
        sources: Sequence[ColdSource],
        n_host_pages: int,
        pages_per_unit: float = 1.0,
    ) -> None:
        self._forest = forest
        self._room = room
        self._lookups = lookups
        self._sources = {source.tier: source for source in sources}
        self._probe_pages = max(1, int(PROBE_PAGES / pages_per_unit))
        self.urgency_of: UrgencyOf = lambda _: None
        """By request id: whose pages come first. Of whom it does not know, those who came first."""
        self._order = ReadOrder(n_host_pages, int(n_host_pages * HELD_SHARE), self._urgency)
        self._reads = HeldReads(forest, room, self._order)
        self._tickets: dict[str, Ticket] = {}
        self._n_asked = 0
        self._new: list[Ticket] = []
        self._news: dict[str, None] = {}
        # Nobody of those looked at in line found room, and nothing has changed since.
        self._is_full = False

    @property
    def tickets(self) -> dict[str, Ticket]:
        return self._tickets

    @property
    def wants_time(self) -> bool:
        """Whether the next poll must agree on the time: the same on every rank."""
        return bool(self._new)

    @property
    def next_end_s(self) -> float:
        """When somebody's patience is over next, at the earliest."""
        return self._order.next_end_s

    # -- the request's life -------------------------------------------------------------------

    def request(
        self, rid: str, anchor: Node, tokens: array[int], *, is_ahead: bool = False
    ) -> None:
        """`rid` needs `tokens` after `anchor`, the last node it can use now: look below.

        It is read for at the next poll, when those who came with it are known, too. is_ahead: it is
        only expected, so its pages come after all others'.
        """
        size = self._forest.page_size
        if rid in self._tickets or len(tokens) < size:
            return
        if not self._lookups.may_hit(anchor, tokens[:size]):
            return
        root, prompt = prompt_of(anchor, tokens)
        n_tokens = len(prompt)
        del prompt[n_tokens // size * size :]
        self._n_asked += 1
        ticket = self._tickets[rid] = Ticket(rid, root, prompt, n_tokens, self._n_asked, is_ahead)
        n_pages = (len(prompt) - anchor.end) // size
        read_s = max(
            self._room.manager.read_s(cold.tier, n_pages, self._bytes_before(ticket, cold))
            for cold in self._sources.values()
        )
        ticket.patience_s = self._room.manager.patience_s(n_pages, anchor.end, read_s)
        ticket.asked_s, ticket.ready_s = self._room.now_s, self._room.now_s + read_s
        self._new.append(ticket)
        self._look_up(ticket, anchor)

    def request_again(self, rid: str, root: Node, prompt: array[int]) -> None:
        """As `request`, of one that waits and of which less is cached than there was.

        It came before a store had its prefix, or the host has given that up since. It is not kept
        from running for it: patience runs from its arrival.
        """
        ticket = self._tickets.get(rid)
        if ticket is not None:
            if ticket.pinned is not None or not self.is_settled(rid):
                return  # it stands in line, or what it holds cannot leave
            self.release(rid)
        path = self._forest.peek(root, prompt).path
        anchor = (root, *path)[usable(path)[1]]
        self.request(rid, anchor, prompt[anchor.end :])
        self.give_up(rid)

    def _look_up(self, ticket: Ticket, anchor: Node) -> None:
        """Find out what the stores have of its prompt after `anchor`."""
        stored = self._lookups.ask(ticket.name, ticket.root, ticket.tokens, anchor)
        if stored is not None:
            self._stand_in_line(ticket, stored)
            return
        ticket.is_looked_up = False
        ticket.unknown_tokens = len(ticket.tokens) - anchor.end
        self._news[ticket.name] = None

    def is_asked(self, rid: str, tokens: array[int]) -> bool:
        """Whether `rid` still wants to know what the stores have of `tokens`, as `ask` got them."""
        ticket = self._tickets.get(rid)
        # Another request may have come with the same name: tickets are told by their tokens.
        return ticket is not None and ticket.tokens is tokens

    def answered(self, rid: str, stored: Stored) -> None:
        """What the stores have for one who is asked for is known: it stands in line."""
        self._stand_in_line(self._tickets[rid], stored)

    def _stand_in_line(self, ticket: Ticket, stored: Stored | None) -> None:
        ticket.stored, ticket.is_looked_up = stored, True
        self._order.wait(ticket.name)
        self._news[ticket.name] = None
        self._is_full = False

    def done(self, rid: str) -> bool:
        """True when nothing is under way for this request that it should wait for (any more)."""
        ticket = self._tickets.get(rid)
        return ticket is None or not ticket.waits

    def is_settled(self, rid: str) -> bool:
        """True when nothing more will come for this request."""
        ticket = self._tickets.get(rid)
        if ticket is None:
            return True
        return ticket.is_looked_up and not (ticket.waiting_for or self._order.is_in_line(rid))

    def arriving(self, rid: str) -> tuple[float, int]:
        """Of a request that waits: seconds until its pages should be there, and how many tokens.

        While it is looked up there may be as many as its prompt has.
        """
        ticket = self._tickets[rid]
        n_tokens = ticket.n_loaded_tokens if ticket.is_looked_up else ticket.unknown_tokens
        return ticket.ready_s - self._room.now_s, n_tokens

    def take_news(self) -> list[str]:
        """Requests of which `done` may say something else than before the last call."""
        news, self._news = list(self._news), {}
        return news

    def loaded_tokens(self, rid: str) -> int:
        """Tokens that were brought to the host for this request."""
        ticket = self._tickets.get(rid)
        return ticket.came_tokens if ticket is not None else 0

    def loaded_tokens_from(self, rid: str, tier: Tier) -> int:
        """Of those, the ones that were read in one of the stores."""
        ticket = self._tickets.get(rid)
        return 0 if ticket is None else min(ticket.n_read_tokens[tier], ticket.came_tokens)

    def reads_alone(self, rid: str) -> list[int]:
        """The reads under way that nobody waits for but this request."""
        ticket = self._tickets.get(rid)
        return [] if ticket is None else self._reads.alone(ticket)

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
        now_s = self._room.now_s
        for ticket in self._new:
            if self._tickets.get(ticket.name) is ticket:
                ticket.ready_s += now_s - ticket.asked_s
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
        while n_refused < LINE_LOOK and self._n_reads < READS_MAX:
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
        n_pages = min(wish.n_pages, max(order.room_pages - len(known), order.room_pages // 2))
        if coming or n_pages or ticket.is_displaced:
            known = known[: order.room_pages - n_pages]
            displaced = order.make_room(ticket.name, known, n_pages)
            if displaced is None:
                return False
            for name in displaced:
                self._displace(self._tickets[name])
            self._start(ticket, wish.path, coming, wish.within(n_pages))
        order.leave_line(ticket.name)
        return True

    def _wish(self, ticket: Ticket) -> Wish | None:
        """None if its prompt must be looked up again: what it went on from has left the host."""
        size = self._forest.page_size
        found = self._forest.peek(ticket.root, ticket.tokens)
        known = tuple(found.path)
        if found.partial is not None:
            # What comes below must go on from where the prompt leaves the node.
            known = (*known, self._forest.split(found.partial, found.common // size)[0])
        path = known[: count_held(known)]
        last = path[-1] if path else ticket.root
        stored, first = ticket.stored, last.end // size
        if stored is None:
            return Wish(path, [])
        if first < stored.first:
            self._order.leave_line(ticket.name)
            self._look_up(ticket, last)
            return None
        hole_end = end_of_hole(known[len(path) :], len(ticket.tokens))
        parts: list[tuple[ColdSource, list[bytes]]] = []
        start = last.end
        for tier, hashes in stored.between(first, hole_end // size):
            cold = self._sources[tier]
            n_pages = self._worth_reading(ticket, cold, len(hashes), start)
            if n_pages:
                parts.append((cold, hashes[:n_pages]))
            if n_pages < len(hashes):
                break
            start += n_pages * size
        return Wish(path, parts)

    def _worth_reading(self, ticket: Ticket, cold: ColdSource, n_pages: int, start: int) -> int:
        """How many of `n_pages` pages in a store, from token `start` of its prompt on, to read."""
        if cold.is_away:  # put away since the request came
            return 0
        if ticket.at_any_cost:
            return n_pages
        ask = partial(
            self._room.manager.pages_from,
            cold.tier,
            n_pages,
            start,
            ticket.prompt_tokens,
            queued_bytes=self._bytes_before(ticket, cold),
        )
        n_wanted = ask()
        if not n_wanted and cold.probes.is_due(self._room.now_s):
            n_wanted = ask(least_pages=self._probe_pages)
            # To find out how long it takes; it is not kept waiting for that.
            ticket.is_patient = ticket.is_patient and not n_wanted
        return n_wanted

    def _start(
        self,
        ticket: Ticket,
        path: tuple[Node, ...],
        coming: list[Node],
        parts: list[tuple[ColdSource, list[bytes]]],
    ) -> None:
        """Read for it what follows `path`, wait for what is `coming`, and keep all of it."""
        urgency, size = self._urgency(ticket.name), self._forest.page_size
        bytes_before = {cold: self._bytes_before(ticket, cold) for cold in self._sources.values()}
        for node in coming:
            op = node.op(Tier.HOST)
            assert op is not None
            self._reads.join(ticket, op, urgency)
        parent = last = path[-1] if path else ticket.root
        n_coming = sum(node.n_pages for node in coming)
        pages_from = Counter({parts[0][0] if parts else next(iter(bytes_before)): n_coming})
        for cold, hashes in parts:
            before = last.end
            last = self._reads.read(ticket, cold, last, hashes, urgency)
            pages_from[cold] += (last.end - before) // size
            if last.end - before < len(hashes) * size:
                break
        read_s = max(
            self._room.manager.read_s(cold.tier, n_pages, bytes_before[cold])
            for cold, n_pages in pages_from.items()
        )
        n_loaded = last.end - parent.end + n_coming * size
        if n_loaded or ticket.is_displaced:
            self._reads.hold(ticket, last, n_loaded)
        if not ticket.waiting_for:
            return
        n_pages = n_loaded // size
        ticket.ready_s = self._room.now_s + read_s
        ticket.patience_s = self._room.manager.patience_s(n_pages, last.end - n_loaded, read_s)
        if ticket.asked_s + ticket.patience_s < self._room.now_s:
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

    @property
    def _n_reads(self) -> int:
        return sum(cold.n_reads for cold in self._sources.values())

    def _bytes_before(self, ticket: Ticket, cold: ColdSource) -> int:
        """What comes from a store before a read for it would."""
        n_pages = cold.pages_before(self._urgency(ticket.name))
        return n_pages * cold.page_bytes

    def read_ended(self, op: int, n_done: int, *, is_cleared: bool = False) -> Tier:
        """A read is over, as far as it came; see `HeldReads.ended`."""
        self._is_full = False
        return self._reads.ended(op, n_done, self._heard, is_cleared=is_cleared)

    def read_ended_behind_flush(self, op: int, n_done: int) -> None:
        """The same, but the tree has been emptied meanwhile."""
        self._is_full = False
        self._reads.ended_behind_flush(op, n_done)

    def _heard(self, ticket: Ticket) -> None:
        self._news[ticket.name] = None
