"""What a cold store does for the tiers, and what it says of itself.

A store keeps the pages of one namespace below the host: the local disk, a store that a cluster
shares. Its calls block, and are made on threads of its own tier (`cold/tier.py`); only `known` and
`drain_dropped` are called by the scheduler's thread, and wait for nothing. None of them raises
because of what is outside the process: what cannot be had is a miss, what cannot be stored is not
stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tiered_kv.core.ids import PageHash, Tier
from tiered_kv.tiers.page_format import PageFormat


@dataclass(frozen=True, slots=True)
class StoreTraits:
    """What must be known of a store to use it well."""

    tier: Tier
    """How far it is: a larger one is farther from the compute."""
    page_format: PageFormat
    """What it keeps and moves; buffers are host slots all the same."""
    knows_locally: bool = True
    """`known` answers. If not, only `lookup` does, which takes a round trip."""
    is_shared: bool = False
    """Other servers read what is written there."""


class PageStore(Protocol):
    """The pages of one namespace. Every method is thread-safe.

    Pages are named by 32 bytes, which stand for their contents: storing one twice is storing it
    once. Buffers are contiguous memoryviews of host slots, `page_bytes` or more long.
    """

    @property
    def traits(self) -> StoreTraits: ...

    def known(self, hashes: Sequence[PageHash], /) -> int | None:
        """How many leading pages are there, from memory; None: ask (`lookup`)."""
        ...

    def lookup(self, hashes: Sequence[PageHash], /) -> int:
        """How many leading pages are there. They may be gone by the time they are read."""
        ...

    def get(self, hashes: Sequence[PageHash], buffers: Sequence[memoryview], /) -> int:
        """Fills buffers; returns how many leading pages came, whole and as they were stored.

        Buffers after those may hold anything.
        """
        ...

    def put(self, hashes: Sequence[PageHash], buffers: Sequence[memoryview], /) -> int:
        """Stores the pages that are not there; returns how many leading ones are there now."""
        ...

    def touch(self, hashes: Iterable[PageHash], /) -> None:
        """Pages are used in a nearer tier: they are not to be the first to go."""
        ...

    def drop(self, hashes: Sequence[PageHash], /) -> int:
        """Forgets pages, of a shared store those that this server has written, as far as it
        remembers; returns how many there were."""
        ...

    def drain_dropped(self) -> list[PageHash] | None:
        """Pages that are there no more, since the last call, as far as it knows.

        None: so many that each page that matters must be asked for (`known`).
        """
        ...
