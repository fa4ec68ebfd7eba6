"""The simulated tiers: the server's forest and memory manager, with links instead of copies.

A unit of the forest stands for one block of the workload. The device pool is counted in tokens:
blocks in the forest, plus what running requests hold besides (`LiveRequest.private_tokens`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.key import namespace_hash
from tiered_kv.forest.node import Node, Tokens
from tiered_kv.forest.residency import Residency
from tiered_kv.forest.results import Match
from tiered_kv.memory.demand import DemandForecast
from tiered_kv.memory.loads import Loads
from tiered_kv.memory.manager import MemoryManager
from tiered_kv.memory.read_order import Pages
from tiered_kv.memory.ticket import usable
from tiered_kv.scheduler.request import QueuedRequest
from tiered_kv.scheduler.request_policy import Arriving
from tiered_kv.simulation.cache_policies.hicache import read_rules
from tiered_kv.simulation.disk import SimulatedDisk
from tiered_kv.simulation.events import EventQueue
from tiered_kv.simulation.host import HostMemory
from tiered_kv.simulation.links import Links
from tiered_kv.simulation.live import LiveRequest
from tiered_kv.simulation.reads import Reads
from tiered_kv.simulation.settings import InstanceSettings
from tiered_kv.simulation.shared_store import SharedStore
from tiered_kv.simulation.transfers import Observer
from tiered_kv.simulation.writes import Writes

_ABSENT = Residency.ABSENT
#: Loads ahead of need leave this share of the device's pool free.
FORECAST_LEAVES_SHARE = 0.1

ManagerFactory = Callable[[Forest], MemoryManager]


@dataclass(frozen=True, slots=True)
class Prefix:
    """What a request starts from: `n_units` on the device, now or when a load has arrived."""

    match: Match
    n_units: int
    loaded_units: int
    """Those of them that are being loaded for this request."""
    ready_s: float
    """When all of it will have arrived; now if nothing is on its way."""


class TieredCache:
    """Device, host and disk of one instance."""

    def __init__(
        self,
        settings: InstanceSettings,
        block_tokens: int,
        events: EventQueue,
        make_manager: ManagerFactory,
        observer: Observer | None = None,
        shared: SharedStore | None = None,
    ) -> None:
        """shared: the store of the fleet, of which the settings say what it costs."""
        cache = settings.cache
        self.on_news: Callable[[], None] = _nobody
        """Called when `take_news` may have something to say."""
        below = [Tier.DISK, *([Tier.STORE] if shared is not None else [])]
        self.forest = Forest(page_size=1, tiers=(Tier.DEVICE, Tier.HOST, *below))
        self.manager = make_manager(self.forest)
        self.root = self.forest.root(namespace_hash("simulation"))
        self.block_tokens = block_tokens
        self.block_bytes = int(settings.model.kv_bytes_per_token * block_tokens)
        self.capacity_tokens = settings.device_tokens()
        self.host_units = cache.host_bytes // self.block_bytes
        self.private_tokens = 0
        self.evicted_tokens = 0
        self._events = events
        self._changed: list[Node] = []
        self.disk = SimulatedDisk(cache.disk_bytes, self.block_bytes) if cache.disk_bytes else None
        pages_per_unit = block_tokens / settings.page_tokens
        links = Links(settings, block_tokens, events, self.disk, shared, observer)
        self.links = links.all
        self.to_device, self.to_host = links.to_device, links.to_host
        self.to_disk, self.from_disk = links.to_disk, links.from_disk
        self._loads = Loads(pages_per_unit)
        self.host = HostMemory(
            self.forest,
            read_rules(self.manager, cache, block_tokens),
            self.host_units,
            events,
            evict=lambda n_units: self._evict(Tier.HOST, n_units),
            changed=self._has_changed,
        )
        self.writes = Writes(
            self.forest,
            self.manager,
            self.host,
            self.to_host,
            links.to_stores(),
            self.block_bytes,
            self._has_changed,
        )
        self.reads = None
        if links.sources:
            self.reads = Reads(
                self.forest,
                self.host,
                links.sources,
                events,
                pages_per_unit=pages_per_unit,
                ends_in_mid_read=cache.stop_policy in ("best_effort", "timeout"),
                on_news=self._tell_news,
                on_room=self.writes.advance,
            )

    def _has_changed(self, nodes: Sequence[Node]) -> None:
        self._changed.extend(nodes)

    # -- room on the device -------------------------------------------------------------------

    @property
    def used_tokens(self) -> int:
        """Tokens of KV on the device, in use or cached."""
        forest = self.forest
        units = forest.evictable_tokens(Tier.DEVICE) + forest.protected_tokens(Tier.DEVICE)
        return units * self.block_tokens + self.private_tokens

    @property
    def free_tokens(self) -> int:
        return self.capacity_tokens - self.used_tokens

    @property
    def available_tokens(self) -> int:
        """Free tokens and those that could be freed by eviction."""
        evictable = self.forest.evictable_tokens(Tier.DEVICE) * self.block_tokens
        return self.free_tokens + evictable

    def make_room(self, n_tokens: int) -> bool:
        """Evict until `n_tokens` are free on the device; whether they are."""
        shortage = n_tokens - self.free_tokens
        if shortage > 0:
            self._evict(Tier.DEVICE, -(-shortage // self.block_tokens))
        return self.free_tokens >= n_tokens

    def take_private(self, live: LiveRequest, n_tokens: int) -> None:
        """`live` holds `n_tokens` more outside the forest."""
        live.private_tokens += n_tokens
        self.private_tokens += n_tokens

    def resident_tokens(self) -> dict[str, float]:
        """Tokens cached on device and host, for a timeline."""
        return {
            tier.name.lower(): float(self.forest.resident_tokens(tier) * self.block_tokens)
            for tier in (Tier.DEVICE, Tier.HOST)
        }

    # -- a request's KV -----------------------------------------------------------------------

    def pin_prefix(self, live: LiveRequest, max_tokens: int) -> Prefix:
        """Pin what the device has of the first `max_tokens` of its prompt."""
        forest, now_s = self.forest, self._events.now()
        match = forest.match(self.root, live.queued.tokens, max_tokens // self.block_tokens)
        last, ready_s = self.root, now_s
        for node in match.path:
            state = node.state(Tier.DEVICE)
            if state is _ABSENT:
                break
            if state is Residency.LOADING:
                ready_s = self.to_device.expected_end_s()
            last = node
        forest.pin(last, Tier.DEVICE)
        live.pinned, live.committed_units = last, last.end
        return Prefix(match, last.end, 0, ready_s)

    def load_back(self, live: LiveRequest, prefix: Prefix) -> Prefix:
        """Start loading what the host has after `prefix`, as the memory manager sees fit."""
        forest = self.forest
        load = self._loads.wanted(
            self.manager,
            prefix.match,
            self._events.now(),
            prompt_tokens=-(-live.queued.prompt_tokens // self.block_tokens),
            queued_bytes=self.to_device.queued_bytes,
        )
        if load is None:
            return prefix
        nodes = [forest.node(node_id) for node_id in load.node_ids]
        n_units = sum(node.n_pages for node in nodes)
        if not self._load(nodes, n_units):
            return prefix
        assert live.pinned is not None
        forest.unpin(live.pinned, Tier.DEVICE)
        live.pinned, live.committed_units = nodes[-1], nodes[-1].end
        return Prefix(prefix.match, nodes[-1].end, n_units, self.to_device.expected_end_s())

    def commit(self, live: LiveRequest, tokens: Tokens, kv_tokens: int) -> None:
        """The first `kv_tokens` of `live` are computed: put the whole blocks into the forest.

        `tokens`: the ids of at least all those blocks.
        """
        n_units = min(kv_tokens // self.block_tokens, len(tokens))
        if n_units > live.committed_units:
            forest = self.forest
            result = forest.insert(self.root, tokens, range(n_units), limit=n_units)
            forest.pin(result.last, Tier.DEVICE)
            if live.pinned is not None:
                forest.unpin(live.pinned, Tier.DEVICE)
            live.pinned = result.last
            live.committed_units = n_units
            self._changed.extend(result.adopted)
            self.writes.used(result.last, result.adopted)
        elif live.pinned is not None:
            self.writes.used(live.pinned)
        self.take_private(
            live, kv_tokens - live.committed_units * self.block_tokens - live.private_tokens
        )

    def release(self, live: LiveRequest) -> None:
        """`live` gives up its KV: its blocks in the forest stay as cache, the rest is freed."""
        if live.pinned is not None:
            self.forest.unpin(live.pinned, Tier.DEVICE)
            live.pinned = None
        live.committed_units = 0
        self.take_private(live, -live.private_tokens)

    def take_changes(self) -> list[Node]:
        """Nodes that were added, left a tier or arrived in one since the last call."""
        changed, self._changed = self._changed, []
        return changed

    # -- disk to host -------------------------------------------------------------------------

    def prefetch(self, live: LiveRequest) -> None:
        """Ask for what disk has of `live`'s prompt; it is read for at the next `poll`."""
        if self.reads is None:
            return
        tokens = live.queued.tokens
        path = self.forest.match(self.root, tokens).path
        _, n_usable = usable(path)
        anchor = path[n_usable - 1] if n_usable else self.root
        self.reads.request(str(live.queued.request_id), anchor, tokens[anchor.end :])

    def prefetch_again(self, queued: QueuedRequest) -> None:
        """The same for one that waits, of which something has left device and host since."""
        if self.reads is not None:
            self.reads.request_again(str(queued.request_id), self.root, queued.tokens)

    def arriving(self, request_id: int) -> Arriving | None:
        """What is on its way for a request, if it is to wait for that."""
        rid = str(request_id)
        if self.reads is None or self.reads.done(rid):
            return None
        seconds, units = self.reads.arriving(rid)
        return Arriving(self._events.now() + seconds, units * self.block_tokens)

    def take_news(self) -> list[int]:
        """Requests that may wait for pages from disk from now on, or do no longer."""
        return [] if self.reads is None else [int(rid) for rid in self.reads.take_news()]

    def _tell_news(self) -> None:
        self.on_news()

    def wait_no_longer(self, request_id: int) -> None:
        """A request is to run without the pages that have not come."""
        if self.reads is not None:
            self.reads.wait_no_longer(str(request_id))

    def admitted(self, live: LiveRequest) -> None:
        """`live` runs: what was brought from disk for it is ordinary cache from now on."""
        if self.reads is not None:
            rid = str(live.queued.request_id)
            live.prefetched_tokens = self.reads.loaded_tokens(rid) * self.block_tokens
            shared_units = self.reads.loaded_tokens_from(rid, Tier.STORE)
            live.shared_tokens = shared_units * self.block_tokens
            self.reads.release(rid)

    def poll(self) -> None:
        """As the server's `KVHierarchy.poll`: what waited for room, or for its time, goes on."""
        self.writes.advance()
        if self.reads is not None:
            self.reads.advance()

    def brought_ahead_tokens(self, live: LiveRequest) -> int:
        """Tokens of its prefix that a forecast had brought to the device for it, or its like."""
        assert live.pinned is not None
        return self.forest.take_ahead(live.pinned, Tier.DEVICE) * self.block_tokens

    # -- moves --------------------------------------------------------------------------------

    def _load(self, nodes: list[Node], n_units: int) -> bool:
        """Start loading `nodes` to the device, pinned there; False if there is no room."""
        forest, last = self.forest, nodes[-1]
        forest.pin(last, Tier.HOST)
        if not self.make_room(n_units * self.block_tokens):
            forest.unpin(last, Tier.HOST)
            return False
        self._loads.begun(self._events.now())
        op = self.host.next_op()
        for node in nodes:
            slots = range(node.n_pages)
            forest.start_transfer(node, Tier.DEVICE, Residency.LOADING, slots, op)
        forest.pin(last, Tier.DEVICE)

        def done(_: float) -> None:
            self._changed.extend(forest.finish_transfer(op, Tier.DEVICE))
            forest.unpin(last, Tier.HOST)

        self.to_device.submit(n_units * self.block_bytes, done)
        return True

    def forecast(self, forecast: DemandForecast) -> None:
        """What is expected to be needed: protected, and loaded into free device pages.

        Only while no request's own pages are on the way, and never into the last of the room:
        pages that arrive can't be evicted, and those who decode need some.
        """
        spare = self.free_tokens - int(self.capacity_tokens * FORECAST_LEAVES_SHARE)
        free_units = 0 if self.to_device.queued_bytes else max(0, spare // self.block_tokens)
        for load in self.manager.on_forecast(forecast, free_units):
            nodes = [self.forest.node(node_id) for node_id in load.node_ids]
            if self._load(nodes, sum(node.n_pages for node in nodes)):
                # Nobody runs on it yet: it is cache like any other.
                self.forest.unpin(nodes[-1], Tier.DEVICE)
                for node in nodes:
                    self.forest.mark_ahead(node, Tier.DEVICE)

    def _evict(self, tier: Tier, n_units: int) -> int:
        """Drop by policy; returns the units freed."""
        forest, freed = self.forest, 0
        for drop in self.manager.on_pressure(tier, n_units):
            node = forest.node(drop.node_id)
            parent = node.parent
            assert parent is not None
            freed += node.n_pages
            slots = forest.evict(node, tier)
            if tier is Tier.HOST:
                self.host.free_host(cast(Pages, slots))
            self._changed.append(node)
            self.writes.evicted(node, parent, tier)
        if tier is Tier.DEVICE:
            self.evicted_tokens += freed * self.block_tokens
        return freed


def _nobody() -> None:
    """Nobody listens yet."""
