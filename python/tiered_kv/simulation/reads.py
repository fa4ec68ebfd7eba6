"""Prefetch under the virtual clock: carries out what `memory.prefetch` decides."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from tiered_kv.core.ids import PageHash, Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.key import page_hashes
from tiered_kv.forest.node import Node, Tokens
from tiered_kv.memory.cold_source import Read
from tiered_kv.memory.prefetch import PrefetchPlanner
from tiered_kv.memory.probes import Probes
from tiered_kv.memory.read_order import Urgency
from tiered_kv.memory.read_turns import ReadTurns, Stretch
from tiered_kv.memory.stored_pages import Stored
from tiered_kv.scheduler.cost_model import EdgeCost
from tiered_kv.simulation.events import EventQueue
from tiered_kv.simulation.host import HostMemory
from tiered_kv.simulation.transfers import Observer

Ended = Callable[[int, int], None]
"""Told of a read that is over: its number, and how many leading pages came."""


class SimulatedStore(Protocol):
    """Pages by name, below the host."""

    def known(self, hashes: Sequence[PageHash], /) -> int:
        """How many leading pages are there."""
        ...

    def put(self, hashes: Sequence[PageHash], /) -> int:
        """Stores the pages that are not there; returns how many leading ones are there now."""
        ...

    def touch(self, hashes: Iterable[PageHash], /) -> None:
        """Pages are read, or used in a nearer tier."""
        ...

    @property
    def has_dropped(self) -> bool:
        """Whether `drain_dropped` has something to say."""
        ...

    def drain_dropped(self) -> list[PageHash] | None:
        """Pages that are there no more, since the last call; None: too many to remember."""
        ...


class StoreReads:
    """A `memory.cold_source.ColdSource`: one stretch at a time, with latency and bandwidth.

    A read takes what the cost model says if no other comes between: latency once, then bandwidth.
    """

    is_away = False

    def __init__(
        self,
        name: str,
        tier: Tier,
        cost: EdgeCost,
        events: EventQueue,
        store: SimulatedStore | None,
        *,
        unit_bytes: int,
        pages_per_unit: float,
        observer: Observer | None = None,
    ) -> None:
        self.name = name
        self.tier = tier
        self.n_bytes = 0
        """Bytes carried so far."""
        self.busy_s = 0.0
        """Seconds that reads took so far."""
        self.page_bytes = unit_bytes
        self.probes = Probes()
        self.ended: Ended = _nobody
        self._cost = cost
        self._events = events
        self.store = store
        self._observer = observer
        self._turns = ReadTurns(pages_per_unit)
        self._hashes: dict[int, list[PageHash]] = {}
        self._stretch: Stretch | None = None
        """The one under way,"""
        self._start_s = 0.0
        """since then,"""
        self._event = -1
        """until this event."""

    @property
    def n_reads(self) -> int:
        return len(self._hashes)

    def pages_before(self, urgency: Urgency) -> int:
        return self._turns.pages_before(urgency)

    def begin(self, read: Read, urgency: Urgency) -> None:
        self._hashes[read.op] = read.hashes
        self._turns.add(read.op, len(read.hashes), urgency)
        self._start()

    def hurry(self, op: int, urgency: Urgency) -> None:
        self._turns.hurry(op, urgency)

    def forget(self, op: int, *, is_probe: bool) -> None:
        self._turns.forget(op, is_probe=is_probe)

    def cut(self, op: int) -> None:
        """End a read now, in the middle of a stretch: what has come of it is there."""
        stretch = self._stretch
        if op not in self._hashes:
            return
        if stretch is None or stretch.op != op:
            self._over(op)
            return
        self._events.cancel(self._event)
        elapsed_s = self._events.now() - self._start_s
        latency_s = 0.0 if stretch.start else self._cost.latency_s
        streamed = max(0.0, elapsed_s - latency_s) * self._cost.bandwidth
        # Only whole pages count.
        n_pages = min(int(streamed / self.page_bytes), stretch.stop - stretch.start)
        self._stretch = None
        self._arrived(stretch, n_pages)
        self._over(op)
        self._start()

    def _start(self) -> None:
        if self._stretch is not None:
            return
        stretch = self._stretch = self._turns.next()
        if stretch is None:
            return
        self._start_s = self._events.now()
        n_pages, seconds = stretch.stop - stretch.start, 0.0
        if n_pages:
            seconds = n_pages * self.page_bytes / self._cost.bandwidth
            seconds += 0.0 if stretch.start else self._cost.latency_s
        self._event = self._events.schedule(self._start_s + seconds, self._finish)

    def _finish(self, now_s: float) -> None:
        stretch, store = self._stretch, self.store
        assert stretch is not None
        assert store is not None
        self._stretch = None
        hashes = self._hashes[stretch.op][stretch.start : stretch.stop]
        n_pages = store.known(hashes)
        store.touch(hashes[:n_pages])
        is_over = self._arrived(stretch, n_pages)
        if self._observer is not None and n_pages:
            self._observer(self.name, self._start_s, now_s, n_pages * self.page_bytes)
        if is_over:
            self._over(stretch.op)
        self._start()

    def _arrived(self, stretch: Stretch, n_pages: int) -> bool:
        self.busy_s += self._events.now() - self._start_s
        self.n_bytes += n_pages * self.page_bytes
        return self._turns.arrived(stretch, n_pages)

    def _over(self, op: int) -> None:
        n_done, _ = self._turns.end(op)
        self._turns.drop(op)
        del self._hashes[op]
        self.ended(op, n_done)


class Lookups:
    """A `memory.cold_source.StoreLookups`: answers at once, the nearest store first."""

    def __init__(self, stores: Sequence[tuple[Tier, SimulatedStore]]) -> None:
        self._stores = stores

    def may_hit(self, anchor: Node, first: Tokens) -> bool:
        if first.tobytes() in anchor.children:
            return True  # on its way for another request
        name = page_hashes(anchor.last_page_hash, first, 1)
        return any(store.known(name) for _, store in self._stores)

    def ask(self, rid: str, root: Node, tokens: array[int], anchor: Node) -> Stored:  # noqa: ARG002
        name, names, at = anchor.last_page_hash, list[PageHash](), anchor.end
        ends: list[tuple[Tier, int]] = []
        for tier, store in self._stores:
            start = at
            while at < len(tokens):
                if len(names) == at - anchor.end:
                    # One at a time: most lookups miss at once, and hashing a long prompt costs.
                    (name,) = page_hashes(name, tokens[at : at + 1], 1)
                    names.append(name)
                if not store.known((names[at - anchor.end],)):
                    break
                at += 1
            if at > start:
                ends.append((tier, at))
        return Stored(anchor.end, tuple(ends), names[: at - anchor.end], anchor.end)


class Reads(PrefetchPlanner):
    """Who is read for, and what becomes of it.

    ends_in_mid_read: whether a request that is to run has what came of its reads until then, as
    with HiCache. on_news: is called when `take_news` may have something to say; on_room: when there
    may be room on the host again.
    """

    def __init__(
        self,
        forest: Forest,
        host: HostMemory,
        sources: Sequence[StoreReads],
        events: EventQueue,
        *,
        pages_per_unit: float,
        ends_in_mid_read: bool,
        on_news: Callable[[], None],
        on_room: Callable[[], None],
    ) -> None:
        """sources: the nearest first; each has a store."""
        stores = [(source.tier, source.store) for source in sources if source.store is not None]
        super().__init__(forest, host, Lookups(stores), sources, host.n_units, pages_per_unit)
        for source in sources:
            source.ended = self._ended
        self._cuts = [source.cut for source in sources]
        self._events = events
        self._ends_in_mid_read = ends_in_mid_read
        self._on_news = on_news
        self._on_room = on_room
        self._looks_s = math.inf
        """When the next look at who lost patience is scheduled."""

    def advance(self) -> None:
        super().advance()
        # Patience is over after its last moment, not in it.
        at_s = math.nextafter(self.next_end_s, math.inf)
        if at_s < self._looks_s:
            self._looks_s = at_s
            self._events.schedule(at_s, self._look)

    def wait_no_longer(self, rid: str) -> None:
        """The request is to run without the pages that have not come."""
        if not self.done(rid):
            self.give_up(rid)
        if self._ends_in_mid_read:
            for op in self.reads_alone(rid):
                for cut in self._cuts:
                    cut(op)

    def _look(self, now_s: float) -> None:  # noqa: ARG002
        self._looks_s = math.inf
        self.advance()
        self._on_news()

    def _ended(self, op: int, n_pages: int) -> None:
        self.read_ended(op, n_pages)
        self._on_room()
        self.advance()
        self._on_news()


def _nobody(op: int, n_pages: int) -> None:
    """Nobody listens yet."""
