"""One cold store as a tier: its queues, what it gave up, and what is used above it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tiered_kv.core.ids import PageHash, Tier
from tiered_kv.memory.cold_source import Read
from tiered_kv.memory.probes import Probes
from tiered_kv.memory.read_order import Urgency
from tiered_kv.memory.store_use import DroppedPages
from tiered_kv.tiers.cold.read_queue import ColdRead, ReadQueue, read_stretch
from tiered_kv.tiers.cold.use import UsedPages
from tiered_kv.tiers.cold.writes import ColdWrites
from tiered_kv.tiers.context import TierContext
from tiered_kv.tiers.page_store import PageStore, StoreTraits
from tiered_kv.tiers.transfer import TransferQueue


class ColdTier:
    """Everything around one store. Whatever becomes of the store, the tier stays.

    write_share: of the host pool, the most that may be on its way to the store.
    """

    def __init__(self, context: TierContext, store: PageStore, write_share: float) -> None:
        self._context = context
        self.last_store = store
        """The one in use now, or before it was put away."""
        self.is_away = False
        """Whether pages have no name now under which to go there or come from there."""
        self.traits: StoreTraits = store.traits
        self.reads = ReadQueue(f"{self.name}-to-host", read_stretch(context))
        self.writes = ColdWrites(context, self.tier, lambda: self.store, write_share)
        self.dropped = DroppedPages(
            context.forest,
            self.tier,
            lambda: self.store,
            lambda hashes: context.listener.dropped(hashes, self.tier),
        )
        self.used = UsedPages(context, self.tier, lambda: self.store)
        self.probes = Probes()

    @property
    def store(self) -> PageStore | None:
        """Where pages with a name go to and come from; None while they have none."""
        return None if self.is_away else self.last_store

    def use(self, store: PageStore | None) -> None:
        """From now on; None: none until further notice. What is under way goes where it began."""
        self.is_away = store is None
        if store is not None:
            self.last_store, self.traits = store, store.traits

    def known(self, hashes: Sequence[PageHash]) -> int | None:
        """As `PageStore.known`, and 0 while there is no store."""
        return 0 if self.is_away else self.last_store.known(hashes)

    @property
    def tier(self) -> Tier:
        return self.traits.tier

    @property
    def name(self) -> str:
        return self.tier.name.lower()

    # -- a source of reads (`memory.cold_source`) ---------------------------------------------

    @property
    def page_bytes(self) -> int:
        return self.traits.page_format.page_bytes

    @property
    def n_reads(self) -> int:
        return self.reads.in_flight

    def pages_before(self, urgency: Urgency) -> int:
        return self.reads.pages_before(urgency)

    def begin(self, read: Read, urgency: Urgency) -> None:
        store, epoch = self.last_store, self._context.epoch
        job = ColdRead(read.op, store, read.last, read.hashes, read.host_pages, epoch)
        self.reads.submit_by(job, urgency)

    def hurry(self, op: int, urgency: Urgency) -> None:
        self.reads.hurry(op, urgency)

    def forget(self, op: int, *, is_probe: bool) -> None:
        self.reads.forget(op, is_probe=is_probe)

    def queues(self) -> list[TransferQueue[Any]]:
        """Each with a thread of its own."""
        return [self.writes.queue, self.reads, self.used.queue]

    def __repr__(self) -> str:
        return f"ColdTier({self.name}{'' if self.store is not None else ', away'})"
