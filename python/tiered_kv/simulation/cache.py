"""The simulated tiers: the server's forest and memory manager, with links instead of copies.

A unit of the forest stands for one block of the workload. The device pool is counted in tokens:
blocks in the forest, plus what running requests hold besides (`LiveRequest.private_tokens`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.key import namespace_hash
from tiered_kv.forest.node import Node, Tokens
from tiered_kv.forest.residency import Residency
from tiered_kv.forest.results import Match
from tiered_kv.memory.actions import WriteBack
from tiered_kv.memory.demand import DemandForecast
from tiered_kv.memory.manager import MemoryManager
from tiered_kv.scheduler.request_policy import Arriving
from tiered_kv.simulation.disk_index import DiskIndex
from tiered_kv.simulation.events import EventQueue
from tiered_kv.simulation.live import LiveRequest, Prefetch
from tiered_kv.simulation.settings import InstanceSettings
from tiered_kv.simulation.transfers import Link, Observer

_ABSENT = Residency.ABSENT
#: A node larger than this share of the host pool is written in parts, as the server's tiers do.
HOST_WRITE_SHARE = 0.25
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
        on_ready: Callable[[LiveRequest], None],
        observer: Observer | None = None,
    ) -> None:
        """`on_ready` is told of a request when a transfer from disk that it waits for ended."""
        cache = settings.cache
        self.forest = Forest(page_size=1)
        self.manager = make_manager(self.forest)
        self.root = self.forest.root(namespace_hash("simulation"))
        self.block_tokens = block_tokens
        self.block_bytes = int(settings.model.kv_bytes_per_token * block_tokens)
        self.capacity_tokens = settings.device_tokens()
        self.host_units = cache.host_bytes // self.block_bytes
        self.disk = DiskIndex(cache.disk_bytes // self.block_bytes) if cache.disk_bytes else None
        self.private_tokens = 0
        self.evicted_tokens = 0
        self._settings = cache
        self._events = events
        self._on_ready = on_ready
        self._ops = itertools.count(1)
        self._changed: list[Node] = []
        self._waiting_for: dict[int, list[LiveRequest]] = {}
        costs = settings.costs()

        def link(name: str, source: Tier, target: Tier) -> Link:
            return Link(name, costs.edge(source, target), events, observer)

        self.to_device = link("host to device", Tier.HOST, Tier.DEVICE)
        self.to_host = link("device to host", Tier.DEVICE, Tier.HOST)
        self.from_disk = link("disk to host", Tier.DISK, Tier.HOST)
        self.to_disk = link("host to disk", Tier.HOST, Tier.DISK)

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
        load = self.manager.on_match(
            prefix.match,
            prompt_tokens=self._prompt_units(live),
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
            self._write_back(self.manager.on_insert(result.adopted))
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
        """Bring what disk has of `live`'s prompt to the host; `live.waits_for` says for what."""
        if self.disk is None:
            return
        forest, tokens = self.forest, live.queued.tokens
        path = forest.match(self.root, tokens).path
        parent, n_known = self.root, 0
        for node in path:
            host = node.state(Tier.HOST)
            if host is Residency.LOADING:
                op = node.op(Tier.HOST)
                assert op is not None
                self._wait(live, op)
                live.arriving_tokens += node.n_pages * self.block_tokens
            elif host is not Residency.RESIDENT and node.state(Tier.DEVICE) is _ABSENT:
                break
            parent, n_known = node, n_known + 1
        end = len(tokens)
        for node in path[n_known:]:
            if node.state(Tier.HOST) is not _ABSENT:
                end = node.start
                break
        pages = self.disk.prefix(parent.last_page_hash, tokens[parent.end : end])
        n_units = self.manager.pages_from(
            Tier.DISK,
            len(pages),
            parent.end,
            self._prompt_units(live),
            queued_bytes=self.from_disk.queued_bytes,
        )
        if n_units * self.block_tokens < self._settings.prefetch_threshold_tokens:
            return
        while n_units and not self._make_host_room(n_units, parent):
            n_units //= 2
        if n_units:
            run = tokens[parent.end : parent.end + n_units]
            self._start_prefetch(live, parent, run)
            self.disk.store(pages[:n_units])

    def _prompt_units(self, live: LiveRequest) -> int:
        return -(-live.queued.prompt_tokens // self.block_tokens)

    def _start_prefetch(self, live: LiveRequest, parent: Node, run: Tokens) -> None:
        op = next(self._ops)
        nodes = self.forest.extend(parent, run, Tier.HOST, Residency.LOADING, None, op)
        self.forest.pin(nodes[-1], Tier.HOST)
        n_bytes = len(run) * self.block_bytes
        transfer = self.from_disk.submit(n_bytes, lambda _: self._prefetched(live))
        live.prefetch = Prefetch(op, transfer, nodes[-1], len(run))
        live.arriving_tokens += len(run) * self.block_tokens
        self._wait(live, op)

    def _wait(self, live: LiveRequest, op: int) -> None:
        """Until `op` ends or patience does, by HiCache's stop policies (hiradix_cache.py)."""
        live.waits_for.add(op)
        settings, now_s = self._settings, self._events.now()
        if settings.stop_policy == "best_effort":
            live.give_up_s = now_s
            return
        prefetch = live.prefetch
        n_units = prefetch.n_units if prefetch is not None else 0
        if settings.stop_policy == "patience" and prefetch is not None:
            start = prefetch.last.end - n_units
            queued_bytes = self.from_disk.queued_bytes - prefetch.transfer.n_bytes
            read_s = self.manager.read_s(Tier.DISK, n_units, queued_bytes)
            live.give_up_s = now_s + self.manager.patience_s(n_units, start, read_s)
        elif settings.stop_policy == "timeout":
            ki_tokens = n_units * self.block_tokens / 1024
            timeout_s = settings.timeout_base_s + settings.timeout_per_1024_tokens_s * ki_tokens
            live.give_up_s = now_s + min(settings.timeout_max_s, timeout_s)
        self._waiting_for.setdefault(op, []).append(live)

    def arriving(self, live: LiveRequest) -> Arriving:
        """What is on its way for `live`, with what is queued before it."""
        return Arriving(self.from_disk.expected_end_s(), live.arriving_tokens)

    def stop_prefetch(self, live: LiveRequest) -> None:
        """`live` waits no longer: what has not arrived from disk yet for it will not come."""
        prefetch = live.prefetch
        live.waits_for.clear()
        if prefetch is None:
            return
        share = self.from_disk.cancel(prefetch.transfer)
        # The server's tiers can stop between pages only.
        self._end_prefetch(live, int(share * prefetch.n_units))

    def _prefetched(self, live: LiveRequest) -> None:
        assert live.prefetch is not None
        self._end_prefetch(live, live.prefetch.n_units)

    def _end_prefetch(self, live: LiveRequest, n_units: int) -> None:
        prefetch, forest = live.prefetch, self.forest
        assert prefetch is not None
        # The pin first: pages that did not come are forgotten, with all pins on them.
        forest.unpin(prefetch.last, Tier.HOST)
        live.prefetch = None
        came, lost = forest.finish_leading(prefetch.op, Tier.HOST, n_units)
        for node in came:
            if node.state(Tier.DISK) is _ABSENT:
                forest.set_resident(node, Tier.DISK)
        if came:
            # Until the request is admitted: it would be in vain if they left again before.
            forest.pin(came[-1], Tier.HOST)
            live.host_pinned = came[-1]
        live.prefetched_tokens = n_units * self.block_tokens
        self._changed.extend(came)
        self._changed.extend(node for node, _ in lost)
        for waiter in self._waiting_for.pop(prefetch.op, ()):
            waiter.waits_for.discard(prefetch.op)
            self._on_ready(waiter)

    def admitted(self, live: LiveRequest) -> None:
        """`live` runs: what was brought from disk for it is ordinary cache from now on."""
        if live.host_pinned is not None:
            self.forest.unpin(live.host_pinned, Tier.HOST)
            live.host_pinned = None

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
        op = next(self._ops)
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

    def _write_back(self, actions: Iterable[WriteBack]) -> None:
        for action in actions:
            node = self.forest.node(action.node_id)
            if action.target is Tier.HOST:
                limit = max(1, int(self.host_units * HOST_WRITE_SHARE))
                while node.n_pages > limit:
                    if not self._write_to_host(self.forest.split(node, limit)[0]):
                        return
                if not self._write_to_host(node):
                    return
            else:
                self._write_to_disk(node)

    def _write_to_host(self, node: Node) -> bool:
        """False if there is no room: what is in use on the host fills it."""
        forest, parent = self.forest, node.parent
        assert parent is not None
        if not self._make_host_room(node.n_pages, parent):
            return False
        op = next(self._ops)
        slots = range(node.n_pages)
        forest.start_transfer(node, Tier.HOST, Residency.WRITING_BACK, slots, op)
        forest.pin(node, Tier.DEVICE)

        def done(_: float) -> None:
            forest.unpin(node, Tier.DEVICE)
            written = forest.finish_transfer(op, Tier.HOST)
            self._changed.extend(written)
            self._write_back(self.manager.on_host_resident(written, Tier.DISK))

        self.to_host.submit(node.n_pages * self.block_bytes, done)
        return True

    def _write_to_disk(self, node: Node) -> None:
        forest, disk = self.forest, self.disk
        if disk is None:
            return
        op = next(self._ops)
        forest.start_transfer(node, Tier.DISK, Residency.WRITING_BACK, None, op)
        forest.pin(node, Tier.HOST)

        def done(_: float) -> None:
            forest.unpin(node, Tier.HOST)
            for written in forest.finish_transfer(op, Tier.DISK):
                disk.store(written.page_hashes)

        self.to_disk.submit(node.n_pages * self.block_bytes, done)

    def _make_host_room(self, n_units: int, keep: Node) -> bool:
        forest = self.forest
        used = forest.evictable_tokens(Tier.HOST) + forest.protected_tokens(Tier.HOST)
        shortage = n_units - (self.host_units - used)
        if shortage <= 0:
            return True
        forest.pin(keep, Tier.HOST)
        is_enough = forest.evictable_tokens(Tier.HOST) >= shortage
        if is_enough:
            is_enough = self._evict(Tier.HOST, shortage) >= shortage
        forest.unpin(keep, Tier.HOST)
        return is_enough

    def _evict(self, tier: Tier, n_units: int) -> int:
        """Drop by policy; returns the units freed."""
        forest, freed = self.forest, 0
        for drop in self.manager.on_pressure(tier, n_units):
            node = forest.node(drop.node_id)
            freed += node.n_pages
            forest.evict(node, tier)
            self._changed.append(node)
        if tier is Tier.DEVICE:
            self.evicted_tokens += freed * self.block_tokens
        return freed
