"""What one request wants of the cold stores, and has."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np

from tiered_kv.core.ids import Tier
from tiered_kv.forest.node import Node
from tiered_kv.forest.residency import Residency
from tiered_kv.memory.cold_source import ColdSource
from tiered_kv.memory.read_order import Pages
from tiered_kv.memory.stored_pages import Stored


@dataclass(slots=True, eq=False)
class Ticket:
    """Of the request `name`: the tree `root`, its prompt's whole pages, and transfers."""

    name: str
    root: Node
    tokens: array[int]
    prompt_tokens: int
    number: int
    """Its place among all tickets that there were."""
    is_ahead: bool
    """Whether the request is only expected."""
    at_any_cost: bool = False
    """Whether its pages are read even if computing them is sooner: somebody has ordered it."""
    is_looked_up: bool = False
    unknown_tokens: int = 0
    """While it is looked up: those that a store may have."""
    stored: Stored | None = None
    waiting_for: dict[int, None] = field(default_factory=dict)
    """Reads under way, by op."""
    is_patient: bool = True
    asked_s: float = 0.0
    patience_s: float = 0.0
    ready_s: float = float("inf")
    """When its pages should be there; while it is looked up, all of them."""
    is_displaced: bool = False
    """Whether it held room once that a more urgent one took."""
    pinned: Node | None = None
    n_loaded_tokens: int = 0
    """Tokens down to `pinned` that came for it from a store, or are about to."""
    n_read_tokens: Counter[Tier] = field(default_factory=Counter)
    """Of those that are there, by where they were read."""

    @property
    def waits(self) -> bool:
        """Whether it is kept from running."""
        return self.is_patient and bool(self.waiting_for or not self.is_looked_up)

    @property
    def came_tokens(self) -> int:
        """Of `n_loaded_tokens`, those that are there."""
        coming = 0
        if self.pinned is not None:
            coming = sum(node.n_tokens for node in path_up(self.pinned) if is_coming(node))
        return max(0, self.n_loaded_tokens - coming)


@dataclass(frozen=True, slots=True)
class Wish:
    """What a ticket would hold and have read now."""

    path: tuple[Node, ...]
    """Nodes that device or host have, or are about to have."""
    parts: list[tuple[ColdSource, list[bytes]]]
    """Hashes of the pages to read after those, in their order, by store."""

    @property
    def n_pages(self) -> int:
        return sum(len(hashes) for _, hashes in self.parts)

    def within(self, n_pages: int) -> list[tuple[ColdSource, list[bytes]]]:
        """Of `parts`, the leading so many pages."""
        kept = []
        for cold, hashes in self.parts:
            if n_pages > 0:
                kept.append((cold, hashes[:n_pages]))
                n_pages -= len(hashes)
        return kept


def path_up(node: Node) -> Iterator[Node]:
    """`node` and those above it, without the root."""
    at = node
    while at.parent is not None:
        yield at
        at = at.parent


def is_coming(node: Node) -> bool:
    """Whether it is on its way to the host."""
    return node.state(Tier.HOST) is Residency.LOADING


def pages_on_host(nodes: Iterable[Node]) -> Pages:
    """The host pages that hold, or will hold, the nodes: in their order."""
    found = (node.slots(Tier.HOST) for node in nodes)
    slots = [cast(Pages, pages) for pages in found if pages is not None]
    return np.concatenate(slots) if slots else np.empty(0, dtype=np.int64)


def count_held(path: tuple[Node, ...]) -> int:
    """How many leading nodes the device or the host has, or is about to have."""
    for position, node in enumerate(path):
        host = node.state(Tier.HOST) in (Residency.RESIDENT, Residency.LOADING)
        if not host and node.state(Tier.DEVICE) is Residency.ABSENT:
            return position
    return len(path)


def end_of_hole(nodes: Iterable[Node], end: int) -> int:
    """Where the host has pages again, below a part that failed to be copied or read; or `end`."""
    for node in nodes:
        if node.state(Tier.HOST) is not Residency.ABSENT:
            return node.start
    return end


def usable(path: Sequence[Node]) -> tuple[int, int]:
    """How many leading nodes the device can provide, and how many it and then the host can."""
    n_device = 0
    for node in path:
        if node.state(Tier.DEVICE) is Residency.ABSENT:
            break
        n_device += 1
    n_usable = n_device
    for node in path[n_device:]:
        if node.state(Tier.HOST) is not Residency.RESIDENT:
            break
        n_usable += 1
    return n_device, n_usable
