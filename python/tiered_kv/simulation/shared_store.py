"""The simulated store of a cluster: what one server wrote, all of them can read."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from tiered_kv.core.ids import PageHash


class SharedStore:
    """Pages by name, at most `capacity_bytes` of them; the one used longest ago goes first.

    It never fails, and answers whether it has a page at once: how long pages take is the business
    of each server's own link to it. That it has lost a page is told to nobody: a read shows it.
    """

    has_dropped = False

    def __init__(self, capacity_bytes: int, page_bytes: int) -> None:
        self._capacity = capacity_bytes // page_bytes
        self._pages: OrderedDict[PageHash, None] = OrderedDict()
        self.n_written = 0
        """Pages that were new here when they were written."""

    def __len__(self) -> int:
        return len(self._pages)

    def known(self, hashes: Sequence[PageHash], /) -> int:
        """How many leading pages are there."""
        return next((n for n, name in enumerate(hashes) if name not in self._pages), len(hashes))

    def put(self, hashes: Sequence[PageHash], /) -> int:
        """Stores the pages that are not there; returns how many leading ones are there now."""
        for name in hashes:
            if name not in self._pages:
                self._pages[name] = None
                self.n_written += 1
        while len(self._pages) > self._capacity:
            self._pages.popitem(last=False)
        return self.known(hashes)

    def touch(self, hashes: Iterable[PageHash], /) -> None:
        """Pages are read, or used in a nearer tier."""
        for name in hashes:
            if name in self._pages:
                self._pages.move_to_end(name)

    def drain_dropped(self) -> list[PageHash]:
        """Nobody tells."""
        return []
