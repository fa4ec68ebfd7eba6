"""One namespace as the catalog knows it: its page size, how many pages it has, which have gone."""

from __future__ import annotations

from typing import Protocol

from tiered_kv.tiers.alignment import round_up
from tiered_kv.tiers.disk.index import NamespaceRow
from tiered_kv.tiers.disk.page_table import PageTable
from tiered_kv.tiers.disk.record import BLOCK_BYTES, checksum

MAX_DROPPED = 65_536
"""Names of dropped pages that a namespace remembers until they are asked for."""

_KEY_BYTES = 8


class HasTable(Protocol):
    """The catalog: its table is another one after everything was cleared."""

    @property
    def table(self) -> PageTable: ...


class NamespaceEntries:
    """What all pages of one namespace have in common. Guarded by the catalog's lock, but `find`."""

    def __init__(
        self, catalog: HasTable, namespace_id: bytes, page_bytes: int, description: str
    ) -> None:
        self.number = 0
        """In the index and in segments; 0 while the namespace has no page and is in neither."""
        self.is_recorded = False
        """Does the index say what this namespace is?"""
        self.namespace_id = namespace_id
        self.page_bytes = page_bytes
        self.description = description
        self.slot_bytes = round_up(page_bytes)
        self.record_bytes = BLOCK_BYTES + self.slot_bytes
        self.n_pages = 0
        self.claims: set[bytes] = set()
        self.salt = int.from_bytes(checksum(namespace_id)[:_KEY_BYTES], "little")
        self._catalog = catalog
        self._dropped: list[bytes] | None = []

    def key(self, page_hash: bytes) -> int:
        """What the page table knows a page by: names are hashes, 64 bits of one are as good."""
        return int.from_bytes(page_hash[:_KEY_BYTES], "little") ^ self.salt

    def find(self, page_hash: bytes) -> int | None:
        """Where the page is stored, if it is. Takes no lock.

        Names are told apart by 64 of their bits here; a read compares all of them.
        """
        return self._catalog.table.get(self.key(page_hash))

    def note_dropped(self, page_hash: bytes) -> None:
        """The page is gone. The caller holds the catalog's lock."""
        if self._dropped is not None:
            self._dropped.append(page_hash)
            if len(self._dropped) > MAX_DROPPED:
                self._dropped = None

    def note_cleared(self) -> None:
        """Every page is gone. The caller holds the catalog's lock."""
        if self.n_pages:
            self._dropped = None
        self.n_pages = 0
        self.number = 0
        self.is_recorded = False

    @property
    def has_dropped(self) -> bool:
        return self._dropped is None or bool(self._dropped)

    def drain_dropped(self) -> list[bytes] | None:
        """Pages dropped since the last call and not stored again; None if they were too many to
        remember. The caller holds the catalog's lock."""
        dropped, self._dropped = self._dropped, []
        if dropped is None:
            return None
        return [h for h in dict.fromkeys(dropped) if self.find(h) is None]

    @property
    def row(self) -> NamespaceRow:
        return NamespaceRow(self.number, self.namespace_id, self.page_bytes, self.description)
