"""Between its reads and writes: what a store gives up by itself, and what is used above it.

A page that is used from the device all day is never read from the disk. Its use is told there, now
and then, or it would be the first to go; and if it goes all the same, its node is written again
when it is used the next time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, islice

from tiered_kv.core.ids import PageHash, Tier
from tiered_kv.forest.node import Node
from tiered_kv.forest.residency import Residency
from tiered_kv.tiers.context import TierContext
from tiered_kv.tiers.page_store import PageStore
from tiered_kv.tiers.transfer import TransferQueue

#: Nodes that are looked at in one poll when the store has given pages up.
CHECKED_NODES = 256
#: How often the store is told what was used, and of how many nodes at most.
TELL_EVERY_S = 1.0
USED_NODES_MAX = 4096
#: Pages that are touched in one call: its readers wait meanwhile.
TOUCHED_PAGES = 512


class DroppedPages:
    """Looks for the nodes whose pages the store has given up, some in each poll.

    On one rank, that is; a node is in the tier as long as all ranks have its pages there.
    """

    def __init__(
        self, context: TierContext, tier: Tier, store: Callable[[], PageStore | None]
    ) -> None:
        self._context = context
        self._tier = tier
        self._store = store
        # Pages that have gone since the nodes were listed that are looked at now, and those that
        # these are looked for. None: so many that every node's pages are to be asked for.
        self._news: set[PageHash] | None = set()
        self._gone: set[PageHash] | None = set()
        # Last first. As long on every rank.
        self._unchecked: list[Node] = []
        self._asked: list[Node] = []

    @property
    def is_looking(self) -> bool:
        """The same on every rank."""
        return self._store() is not None and bool(self._unchecked)

    def votes(self) -> list[int]:
        """For the minimum over the ranks: 0 for news, then 1 for each node that is in the store."""
        store = self._store()
        if store is None:
            self._asked = []
            return [1]
        self._listen(store)
        forest = self._context.forest
        self._asked = [
            node
            for node in self._unchecked[-CHECKED_NODES:]
            if node in forest and node.state(self._tier) is Residency.RESIDENT
        ]
        has_news = self._news is None or bool(self._news)
        return [int(not has_news), *(self._is_stored(store, node) for node in self._asked)]

    def counted(self, votes: list[int]) -> None:
        """What the ranks agree on."""
        has_no_news, *are_stored = votes
        forest = self._context.forest
        for node, is_stored in zip(self._asked, are_stored, strict=True):
            if not is_stored:
                forest.evict(node, self._tier)
        if self._store() is None:
            return
        del self._unchecked[-CHECKED_NODES:]
        if not self._unchecked and not has_no_news:
            self._gone, self._news = self._news, set()
            self._unchecked = forest.nodes()[::-1]

    def forget(self) -> None:
        """No node is in the store any more."""
        self._news, self._gone = set(), set()
        self._unchecked.clear()

    def _listen(self, store: PageStore) -> None:
        dropped = store.drain_dropped()
        if dropped is None:
            self._news = None
        elif dropped:
            self._context.listener.dropped(dropped, self._tier)
            if self._news is not None:
                self._news.update(dropped)

    def _is_stored(self, store: PageStore, node: Node) -> int:
        if self._gone is None:
            # Who cannot say is believed to have it: a read will tell.
            return int(store.known(node.page_hashes) in (None, node.n_pages))
        return int(self._gone.isdisjoint(node.page_hashes))


@dataclass(frozen=True, slots=True)
class Touch:
    """Pages that are in a store and were used above it."""

    store: PageStore
    hashes: tuple[list[PageHash], ...]

    @property
    def n_pages(self) -> int:
        return sum(map(len, self.hashes))


class UsedPages:
    """Tells the store what was used, on a thread of its own; nothing waits for that.

    Each rank tells its own when it likes: nothing depends on it but what the store keeps.
    """

    def __init__(
        self, context: TierContext, tier: Tier, store: Callable[[], PageStore | None]
    ) -> None:
        self._context = context
        self._tier = tier
        self._store = store
        self.queue: TransferQueue[Touch] = TransferQueue(f"{tier.name.lower()}-use", _touch)
        self._nodes: dict[Node, None] = {}
        self._next_s = 0.0

    def note(self, last: Node) -> None:
        """The path down to `last` was used."""
        at: Node | None = last
        while at is not None and not at.is_root and at not in self._nodes:
            if len(self._nodes) >= USED_NODES_MAX:
                return
            self._nodes[at] = None
            at = at.parent

    def advance(self) -> None:
        """Tells what was noted, if it is time to."""
        now_s = time.monotonic()
        if not self._nodes or now_s < self._next_s:
            return
        self.queue.acknowledge(self.queue.n_ready)
        if self.queue.in_flight:
            return
        self._next_s = now_s + TELL_EVERY_S
        hashes = tuple(
            node.page_hashes
            for node in self._nodes
            if node in self._context.forest and node.state(self._tier) is Residency.RESIDENT
        )
        self._nodes.clear()
        store = self._store()
        if hashes and store is not None:
            self.queue.submit(Touch(store, hashes))


def _touch(job: Touch) -> int:
    hashes = chain.from_iterable(job.hashes)
    while stretch := list(islice(hashes, TOUCHED_PAGES)):
        job.store.touch(stretch)
    return job.n_pages
