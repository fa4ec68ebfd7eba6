"""All links of one simulated server: between its tiers, and to the store that a fleet shares."""

from __future__ import annotations

from tiered_kv.core.ids import Tier
from tiered_kv.simulation.disk import SimulatedDisk
from tiered_kv.simulation.events import EventQueue
from tiered_kv.simulation.reads import SimulatedStore, StoreReads
from tiered_kv.simulation.settings import InstanceSettings
from tiered_kv.simulation.shared_store import SharedStore
from tiered_kv.simulation.transfers import Link, Observer
from tiered_kv.simulation.writes import StoreEdge

EDGES = {
    "host to device": (Tier.HOST, Tier.DEVICE),
    "device to host": (Tier.DEVICE, Tier.HOST),
    "host to disk": (Tier.HOST, Tier.DISK),
    "disk to host": (Tier.DISK, Tier.HOST),
    "host to store": (Tier.HOST, Tier.STORE),
    "store to host": (Tier.STORE, Tier.HOST),
}
"""Source and target of each, by its name."""


class Links:
    """One each way between device and host, and between the host and each store below it.

    block_tokens: of a unit of the forest. disk, shared: those that are there; without a disk its
    links carry nothing.
    """

    def __init__(
        self,
        settings: InstanceSettings,
        block_tokens: int,
        events: EventQueue,
        disk: SimulatedDisk | None,
        shared: SharedStore | None,
        observer: Observer | None,
    ) -> None:
        costs = settings.costs()
        unit_bytes = int(settings.model.kv_bytes_per_token * block_tokens)

        def link(name: str) -> Link:
            return Link(name, costs.edge(*EDGES[name]), events, observer)

        def reads(name: str, store: SimulatedStore | None) -> StoreReads:
            return StoreReads(
                name,
                EDGES[name][0],
                costs.edge(*EDGES[name]),
                events,
                store,
                unit_bytes=unit_bytes,
                pages_per_unit=block_tokens / settings.page_tokens,
                observer=observer,
            )

        self._disk, self._shared = disk, shared
        self.to_device = link("host to device")
        self.to_host = link("device to host")
        self.to_disk = link("host to disk")
        self.from_disk = reads("disk to host", disk)
        self.all: list[Link | StoreReads] = [
            self.to_device,
            self.to_host,
            self.from_disk,
            self.to_disk,
        ]
        self.sources = [self.from_disk] if disk is not None else []
        """Stores that pages are read from, the nearest first."""
        if shared is not None:
            self._to_shared = link("host to store")
            from_shared = reads("store to host", shared)
            self.sources.append(from_shared)
            self.all += [from_shared, self._to_shared]

    def to_stores(self) -> list[StoreEdge]:
        """Stores that pages are written to, the nearest first."""
        edges = []
        if self._disk is not None:
            edges.append(StoreEdge(Tier.DISK, self._disk, self.to_disk))
        if self._shared is not None:
            edges.append(StoreEdge(Tier.STORE, self._shared, self._to_shared))
        return edges
