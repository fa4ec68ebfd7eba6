"""The simulated host's pool: which units are free, and who makes room there."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.node import Node
from tiered_kv.memory.cold_source import ReadRules
from tiered_kv.memory.read_order import Pages
from tiered_kv.simulation.events import EventQueue


class HostMemory:
    """`n_units` by id; a `memory.cold_source.HostRoom`. No memory is taken for what was not used.

    evict: frees so many units, or all that may go. changed: is told of nodes that became readable.
    """

    def __init__(
        self,
        forest: Forest,
        manager: ReadRules,
        n_units: int,
        events: EventQueue,
        *,
        evict: Callable[[int], object],
        changed: Callable[[Sequence[Node]], None],
    ) -> None:
        self.manager = manager
        self.n_units = n_units
        self._forest = forest
        self._events = events
        self._evict = evict
        self._changed = changed
        self._ops = itertools.count(1)
        self._given_back: list[int] = []
        self._n_begun = 0
        """Those with smaller ids have been in use."""

    @property
    def now_s(self) -> float:
        return self._events.now()

    def next_op(self) -> int:
        return next(self._ops)

    @property
    def n_free(self) -> int:
        return self.n_units - self._n_begun + len(self._given_back)

    def alloc_host(self, n_pages: int, keep: Node | None = None) -> Pages | None:
        """See `HostRoom`; as the server's `TierContext.alloc_host`."""
        shortage = n_pages - self.n_free
        if shortage > 0:
            if keep is not None:
                self._forest.pin(keep, Tier.HOST)
            if self._forest.evictable_tokens(Tier.HOST) >= shortage:
                self._evict(shortage)
            if keep is not None:
                self._forest.unpin(keep, Tier.HOST)
        return None if n_pages > self.n_free else self._take(n_pages)

    def free_host(self, pages: Pages) -> None:
        self._given_back.extend(pages.tolist())

    def stored(self, nodes: Sequence[Node], tier: Tier) -> None:
        if tier is Tier.HOST:
            self._changed(nodes)

    def removed(self, node: Node, tier: Tier) -> None:
        """Nobody asks what a store has lost."""

    def _take(self, n: int) -> Pages:
        kept = max(0, len(self._given_back) - n)
        ids = self._given_back[kept:]
        del self._given_back[kept:]
        n_new = n - len(ids)
        ids += range(self._n_begun, self._n_begun + n_new)
        self._n_begun += n_new
        return np.array(ids, dtype=np.int64)
