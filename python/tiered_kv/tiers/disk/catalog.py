"""What is stored where, in memory: namespaces, their pages, and the segments that hold them.

`contains` and `count_prefix` are lookups in plain dicts and take no lock, so the scheduler's thread
never waits for I/O or for another thread. Everything that changes state takes `Catalog.lock`,
which is never held across I/O.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

from tiered_kv.tiers.disk.index import NamespaceRow
from tiered_kv.tiers.disk.record import BLOCK_BYTES, round_up
from tiered_kv.tiers.disk.segment import Segment, SegmentState, location, segment_of, slot_of

MAX_DROPPED = 65_536
"""Names of dropped pages that a namespace remembers until they are asked for."""


class NamespaceEntries:
    """The pages of one namespace."""

    def __init__(self, number: int, namespace_id: bytes, page_bytes: int, description: str) -> None:
        self.is_recorded = False
        """Is it in the index as it is here? Put there with its next page."""
        self.number = number
        self.namespace_id = namespace_id
        self.page_bytes = page_bytes
        self.description = description
        self.slot_bytes = round_up(page_bytes)
        self.record_bytes = BLOCK_BYTES + self.slot_bytes
        self.locations: dict[bytes, int] = {}
        self.claims: set[bytes] = set()
        self._dropped: list[bytes] | None = []

    def note_dropped(self, page_hash: bytes) -> None:
        """The page is gone. The caller holds the catalog's lock."""
        if self._dropped is not None:
            self._dropped.append(page_hash)
            if len(self._dropped) > MAX_DROPPED:
                self._dropped = None

    @property
    def has_dropped(self) -> bool:
        return self._dropped is None or bool(self._dropped)

    def drain_dropped(self) -> list[bytes] | None:
        """Pages dropped since the last call and not stored again; None if they were too many to
        remember. The caller holds the catalog's lock."""
        dropped, self._dropped = self._dropped, []
        if dropped is None:
            return None
        return [h for h in dict.fromkeys(dropped) if h not in self.locations]

    @property
    def row(self) -> NamespaceRow:
        return NamespaceRow(self.number, self.namespace_id, self.page_bytes, self.description)


class Catalog:
    """All namespaces and segments, and the logical clock that orders their use."""

    def __init__(self) -> None:
        self.lock = threading.Condition(threading.Lock())
        self.namespaces: dict[int, NamespaceEntries] = {}
        self.segments: dict[int, Segment] = {}
        self.clock = 1
        self.next_segment = 0

    # -- namespaces

    def find_namespace(self, namespace_id: bytes) -> NamespaceEntries | None:
        for entries in self.namespaces.values():
            if entries.namespace_id == namespace_id:
                return entries
        return None

    # -- pages (the caller holds the lock)

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    def locate(self, entries: NamespaceEntries, page_hash: bytes) -> tuple[Segment, int] | None:
        loc = entries.locations.get(page_hash)
        if loc is None:
            return None
        return self.segments[segment_of(loc)], slot_of(loc)

    def put(
        self, entries: NamespaceEntries, page_hash: bytes, segment: Segment, slot: int, access: int
    ) -> None:
        """The page is in this slot now; a copy elsewhere is forgotten."""
        previous = self.locate(entries, page_hash)
        if previous is not None:
            previous[0].drop(previous[1])
        segment.put(slot, entries.number, page_hash, access)
        entries.locations[page_hash] = location(segment.number, slot)

    def drop(self, entries: NamespaceEntries, page_hash: bytes, loc: int) -> bool:
        """Forget the page if it still is at `loc`."""
        if entries.locations.get(page_hash) != loc:
            return False
        del entries.locations[page_hash]
        entries.note_dropped(page_hash)
        self.segments[segment_of(loc)].drop(slot_of(loc))
        return True

    def drop_segment(self, segment: Segment) -> int:
        """Forget every page of a segment; returns how many there were."""
        dropped = 0
        for slot, page_hash in enumerate(segment.page_hashes):
            if page_hash is not None:
                entries = self.namespaces[segment.owners[slot]]
                dropped += self.drop(entries, page_hash, location(segment.number, slot))
        return dropped

    def touch(self, entries: NamespaceEntries, hashes: Iterable[bytes]) -> None:
        """Pages are in use. The caller holds the lock."""
        clock = self.tick()
        for page_hash in hashes:
            found = self.locate(entries, page_hash)
            if found is not None:
                found[0].touch(found[1], clock)

    # -- claims: of two writers of one page, one writes and the other waits for it

    def claim(
        self, entries: NamespaceEntries, hashes: Sequence[bytes]
    ) -> tuple[list[int], list[bytes]]:
        """Positions this caller must write, and hashes that another caller is writing now."""
        mine: list[int] = []
        others: list[bytes] = []
        clock = self.tick()
        fresh: set[bytes] = set()
        for position, page_hash in enumerate(hashes):
            found = self.locate(entries, page_hash)
            if found is not None:
                found[0].touch(found[1], clock)
            elif page_hash in fresh:
                continue
            elif page_hash in entries.claims:
                others.append(page_hash)
            else:
                fresh.add(page_hash)
                mine.append(position)
        entries.claims |= fresh
        return mine, others

    def release(self, entries: NamespaceEntries, hashes: Sequence[bytes]) -> None:
        entries.claims.difference_update(hashes)
        self.lock.notify_all()

    def wait_for_others(self, entries: NamespaceEntries, hashes: Sequence[bytes]) -> None:
        self.lock.wait_for(lambda: entries.claims.isdisjoint(hashes))

    # -- totals

    def segments_in(self, *states: SegmentState) -> list[Segment]:
        return [segment for segment in self.segments.values() if segment.state in states]

    def n_pages(self) -> int:
        return sum(len(entries.locations) for entries in self.namespaces.values())

    def payload_bytes(self) -> int:
        return sum(len(e.locations) * e.page_bytes for e in self.namespaces.values())
