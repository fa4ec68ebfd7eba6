"""Tells a cold store what is used above it (`memory.store_use`), on a thread of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, islice

from tiered_kv.core.ids import PageHash, Tier
from tiered_kv.memory.store_use import UsedNodes
from tiered_kv.tiers.context import TierContext
from tiered_kv.tiers.page_store import PageStore
from tiered_kv.tiers.transfer import TransferQueue

#: Pages that are touched in one call: its readers wait meanwhile.
TOUCHED_PAGES = 512


@dataclass(frozen=True, slots=True)
class Touch:
    """Pages that are in a store and were used above it."""

    store: PageStore
    hashes: tuple[list[PageHash], ...]

    @property
    def n_pages(self) -> int:
        return sum(map(len, self.hashes))


class UsedPages(UsedNodes):
    """Tells the store what was used, on a thread of its own; nothing waits for that.

    Each rank tells its own when it likes: nothing depends on it but what the store keeps.
    """

    def __init__(
        self, context: TierContext, tier: Tier, store: Callable[[], PageStore | None]
    ) -> None:
        super().__init__(context.forest, tier)
        self._store = store
        self.queue: TransferQueue[Touch] = TransferQueue(f"{tier.name.lower()}-use", _touch)

    def advance(self) -> None:
        """Tells what was noted, if it is time to."""
        now_s = time.monotonic()
        if not self.is_due(now_s):
            return
        self.queue.acknowledge(self.queue.n_ready)
        if self.queue.in_flight:
            return
        hashes = self.take(now_s)
        store = self._store()
        if hashes and store is not None:
            self.queue.submit(Touch(store, hashes))


def _touch(job: Touch) -> int:
    hashes = chain.from_iterable(job.hashes)
    while stretch := list(islice(hashes, TOUCHED_PAGES)):
        job.store.touch(stretch)
    return job.n_pages
