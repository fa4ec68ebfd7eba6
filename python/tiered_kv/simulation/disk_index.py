"""Which pages the simulated disk holds: content-addressed, least recently used out first."""

from __future__ import annotations

from collections.abc import Iterable

from tiered_kv.core.ids import PageHash
from tiered_kv.forest.key import page_hashes
from tiered_kv.forest.node import Tokens


class DiskIndex:
    """Page hashes in the order of their last use."""

    def __init__(self, capacity_units: int) -> None:
        self._capacity = capacity_units
        self._pages: dict[PageHash, None] = {}

    def __len__(self) -> int:
        return len(self._pages)

    def __contains__(self, page: PageHash) -> bool:
        return page in self._pages

    def store(self, pages: Iterable[PageHash]) -> None:
        """`pages` were written or read: the latest to go."""
        stored = self._pages
        for page in pages:
            stored.pop(page, None)
            stored[page] = None
        while len(stored) > self._capacity:
            del stored[next(iter(stored))]

    def prefix(self, parent: PageHash, tokens: Tokens) -> list[PageHash]:
        """Hashes of the leading units of `tokens`, which follow page `parent`, that are stored."""
        found: list[PageHash] = []
        for at in range(len(tokens)):
            # One at a time: most lookups miss at once, and hashing a long prompt costs.
            (parent,) = page_hashes(parent, tokens[at : at + 1], 1)
            if parent not in self._pages:
                break
            found.append(parent)
        return found
