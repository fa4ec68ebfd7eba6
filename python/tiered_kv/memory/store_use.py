"""Between a store's reads and writes: what it gives up by itself, and what is used above it.

A page that is used from the device all day is never read from the disk. Its use is told there, now
and then, or it would be the first to go; and if it goes all the same, its node is written again
when it is used the next time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from tiered_kv.core.ids import PageHash, Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.node import Node
from tiered_kv.forest.residency import Residency

#: Nodes that are looked at in one poll when the store has given pages up.
CHECKED_NODES = 256
#: How often the store is told what was used, and of how many nodes at most.
TELL_EVERY_S = 1.0
USED_NODES_MAX = 4096


class ForgetfulStore(Protocol):
    """As `tiers.page_store.PageStore`."""

    def known(self, hashes: Sequence[PageHash], /) -> int | None: ...
    def drain_dropped(self) -> list[PageHash] | None: ...


class DroppedPages:
    """Looks for the nodes whose pages the store has given up, some in each poll.

    On one rank, that is; a node is in the tier as long as all ranks have its pages there.
    """

    def __init__(
        self,
        forest: Forest,
        tier: Tier,
        store: Callable[[], ForgetfulStore | None],
        told: Callable[[Sequence[PageHash]], None] = lambda _: None,
    ) -> None:
        """store: None while it is away. told: is told, once, which pages are not there any more."""
        self._forest = forest
        self._tier = tier
        self._store = store
        self._told = told
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
        forest = self._forest
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
        forest = self._forest
        asked, self._asked = self._asked, []
        # Between stages of a pipeline passes go by until they agree: all may be forgotten by then.
        for node, is_stored in zip(asked, are_stored, strict=bool(asked)):
            is_there = node in forest and node.state(self._tier) is Residency.RESIDENT
            if is_there and not is_stored:
                forest.evict(node, self._tier)
                # A node is there as a whole or not at all; and another rank may have lost it.
                gone = self._gone or ()
                self._told([name for name in node.page_hashes if name not in gone])
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
        self._asked = []

    def _listen(self, store: ForgetfulStore) -> None:
        dropped = store.drain_dropped()
        if dropped is None:
            self._news = None
        elif dropped:
            self._told(dropped)
            if self._news is not None:
                self._news.update(dropped)

    def _is_stored(self, store: ForgetfulStore, node: Node) -> int:
        if self._gone is None:
            # Who cannot say is believed to have it: a read will tell.
            return int(store.known(node.page_hashes) in (None, node.n_pages))
        return int(self._gone.isdisjoint(node.page_hashes))


class UsedNodes:
    """What was used above a store since it was told last."""

    def __init__(self, forest: Forest, tier: Tier) -> None:
        self._forest = forest
        self._tier = tier
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

    def is_due(self, now_s: float) -> bool:
        """Whether it is time to tell the store. now_s: the caller's clock."""
        return bool(self._nodes) and now_s >= self._next_s

    def take(self, now_s: float) -> tuple[list[PageHash], ...]:
        """The pages of what was used and is in the store, by node: they are told now."""
        self._next_s = now_s + TELL_EVERY_S
        hashes = tuple(
            node.page_hashes
            for node in self._nodes
            if node in self._forest and node.state(self._tier) is Residency.RESIDENT
        )
        self._nodes.clear()
        return hashes
