"""What deciders of reads have to know of stores and host memory, and the actions they take there.

The server's tiers carry them out with threads, the simulator with events.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tiered_kv.core.ids import PageHash, Tier
from tiered_kv.forest.node import Node
from tiered_kv.memory.probes import Probes
from tiered_kv.memory.read_order import Pages, Urgency
from tiered_kv.memory.stored_pages import Stored


@dataclass(frozen=True, slots=True)
class Read:
    """Pages of one run, from a store into `host_pages`; they end with the node `last`."""

    op: int
    last: Node
    hashes: list[PageHash]
    host_pages: Pages


class ColdSource(Protocol):
    """A store below the host, and the reads from it."""

    @property
    def tier(self) -> Tier: ...
    @property
    def probes(self) -> Probes:
        """Whether the price of reading there is to be doubted."""
        ...

    @property
    def page_bytes(self) -> int: ...
    @property
    def is_away(self) -> bool:
        """Whether nothing can be read there now."""
        ...

    @property
    def n_reads(self) -> int:
        """Reads that are not acknowledged."""
        ...

    def pages_before(self, urgency: Urgency) -> int:
        """Pages that come before a read of that urgency."""
        ...

    def begin(self, read: Read, urgency: Urgency) -> None:
        """Read it when its turn comes, and tell its end."""
        ...

    def hurry(self, op: int, urgency: Urgency) -> None:
        """Somebody waits for this read who is as urgent as that."""
        ...

    def forget(self, op: int, *, is_probe: bool) -> None:
        """Nobody waits for this read. is_probe: see how long it takes all the same."""
        ...


class ReadRules(Protocol):
    """How much is read, and how long it is waited for; see `MemoryManager`."""

    def pages_from(
        self,
        source: Tier,
        n_pages: int,
        start: int,
        prompt_tokens: int,
        *,
        queued_bytes: int = 0,
        least_pages: int = 0,
    ) -> int: ...

    def read_s(self, source: Tier, n_pages: int, queued_bytes: int = 0) -> float: ...

    def patience_s(self, n_pages: int, start: int, read_s: float) -> float: ...


class HostRoom(Protocol):
    """Host memory for what is read, the time, and what reads are worth."""

    @property
    def manager(self) -> ReadRules: ...
    @property
    def now_s(self) -> float:
        """As all ranks agree on it."""
        ...

    def next_op(self) -> int:
        """A number for a transfer."""
        ...

    def alloc_host(self, n_pages: int, keep: Node | None = None) -> Pages | None:
        """Free pages, after evictions, but none above `keep`; None: too little may go."""
        ...

    def free_host(self, pages: Pages) -> None: ...

    def stored(self, nodes: Sequence[Node], tier: Tier) -> None:
        """Is told of nodes that became readable in a tier, or turned out to be."""
        ...

    def removed(self, node: Node, tier: Tier) -> None:
        """Is told of a node that a store was thought to have."""
        ...


class StoreLookups(Protocol):
    """What the stores have."""

    def may_hit(self, anchor: Node, first: array[int]) -> bool:
        """Whether some store has, or may have, the page `first` after `anchor`."""
        ...

    def ask(self, rid: str, root: Node, tokens: array[int], anchor: Node) -> Stored | None:
        """What they have of a prompt's whole pages after `anchor`; None: the answer comes later."""
        ...


UrgencyOf = Callable[[str], Urgency | None]
"""By a request's id; None of whom nothing is known."""
