"""What is stored where, in memory: namespaces, their pages, and the segments that hold them.

`contains` and `count_prefix` take no lock, so the scheduler's thread never waits for I/O or for
another thread. Everything that changes state takes `Catalog.lock`, which is never held across I/O.

`clear` puts new, empty tables in the place of all that was known. What still works on an old
segment (a late write, say) finds that it is not current any more, and counts for nothing.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tiered_kv.tiers.disk.ages import Ages
from tiered_kv.tiers.disk.index import NamespaceRow
from tiered_kv.tiers.disk.namespace_entries import NamespaceEntries
from tiered_kv.tiers.disk.page_table import PageTable
from tiered_kv.tiers.disk.record import ID_BYTES
from tiered_kv.tiers.disk.segment import Segment, location, segment_of, slot_of
from tiered_kv.tiers.disk.segment_board import SegmentBoard


class Cleared(NamedTuple):
    """What was known of a store before it was cleared: a gigabyte, to dispose of in time."""

    segments: dict[int, Segment]
    """Their files are of no use any more."""
    loose: set[Segment]
    board: SegmentBoard
    table: PageTable

    def dispose(self) -> bool:
        """Give some memory back, some microseconds' worth; False if there is none left."""
        if self.loose:
            self.loose.pop()
            return True
        return self.table.dispose() or self.board.dispose()


class Catalog:
    """All namespaces and segments, and the logical clock that orders their use."""

    def __init__(self) -> None:
        self.lock = threading.Condition(threading.Lock())
        self.table = PageTable()
        self.namespaces: dict[int, NamespaceEntries] = {}
        """Those that have pages, or had until a moment ago, by number."""
        self.segments: dict[int, Segment] = {}
        self.board = SegmentBoard(self.lock)
        """Those of them that may be reclaimed."""
        self._loose: set[Segment] = set()
        self.clock = 1
        self.ages = Ages()
        self.next_segment = 0
        self.generation = 0
        """How often everything was cleared."""
        self.n_pages = 0
        self.payload_bytes = 0
        self.emptied: set[int] = set()
        """Numbers of namespaces that have lost their last page."""
        self._next_namespace = 1
        # Also those without pages, as long as somebody uses them.
        self._by_id: weakref.WeakValueDictionary[bytes, NamespaceEntries] = (
            weakref.WeakValueDictionary()
        )

    # -- namespaces (the caller holds the lock)

    def open_namespace(
        self, namespace_id: bytes, page_bytes: int, description: str = ""
    ) -> NamespaceEntries:
        """The namespace of this id, which is made if nobody uses it and nothing is stored."""
        entries = self._by_id.get(namespace_id)
        if entries is None:
            entries = NamespaceEntries(self, namespace_id, page_bytes, description)
            self._by_id[namespace_id] = entries
        elif description and description != entries.description:
            entries.description = description
            entries.is_recorded = False
        return entries

    def register(self, entries: NamespaceEntries) -> bool:
        """Before its pages are stored; True if the index must be told what the namespace is."""
        if not entries.number:
            entries.number = self._next_namespace
            self._next_namespace += 1
            self.namespaces[entries.number] = entries
        return not entries.is_recorded

    def restore_namespace(self, row: NamespaceRow) -> None:
        """What the index says of a namespace."""
        self._next_namespace = max(self._next_namespace, row.number + 1)
        entries = self.open_namespace(row.namespace_id, row.page_bytes, row.description)
        entries.number = row.number
        entries.is_recorded = True
        self.namespaces[row.number] = entries

    def forget_empty_namespaces(self) -> list[int]:
        """Numbers of those that have no page any more, and are not known by number from now on."""
        gone = []
        for number in self.emptied:
            entries = self.namespaces.get(number)
            if entries is None:
                gone.append(number)
            elif not entries.n_pages:
                del self.namespaces[number]
                entries.number = 0
                entries.is_recorded = False
                gone.append(number)
        self.emptied.clear()
        return gone

    # -- pages (the caller holds the lock)

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    def begin_epoch(self) -> None:
        """Pages used from now on are told from those used before."""
        place = self.ages.begin_epoch(self.tick())
        self.board.pass_epoch(place)
        for segment in self._loose:
            segment.pass_epoch(place)

    def add_segment(self, segment: Segment) -> None:
        self.segments[segment.number] = segment
        self._loose.add(segment)

    def remove_segment(self, segment: Segment) -> None:
        """It holds no page any more."""
        self.withdraw(segment)
        self._loose.discard(segment)
        del self.segments[segment.number]

    def offer(self, segment: Segment) -> None:
        """The segment may be reclaimed from now on."""
        if segment in self._loose:
            self._loose.discard(segment)
            self.board.add(segment)

    def withdraw(self, segment: Segment) -> None:
        """The segment may not be reclaimed from now on."""
        if segment not in self._loose:
            self.board.remove(segment)
            self._loose.add(segment)

    def is_current(self, segment: Segment) -> bool:
        """False once the segment was cleared or deleted."""
        return self.segments.get(segment.number) is segment

    def locate(self, entries: NamespaceEntries, page_hash: bytes) -> tuple[Segment, int] | None:
        loc = entries.find(page_hash)
        if loc is None:
            return None
        segment, slot = self.segments[segment_of(loc)], slot_of(loc)
        is_it = segment.owner(slot) == entries.number and segment.page_hash(slot) == page_hash
        return (segment, slot) if is_it else None

    def put(
        self, entries: NamespaceEntries, page_hash: bytes, segment: Segment, slot: int, access: int
    ) -> None:
        """The page is in this slot now; a copy elsewhere is forgotten."""
        key = entries.key(page_hash)
        previous = self.table.get(key)
        if previous is not None:
            self._vacate(previous, page_hash)
        segment.put(slot, entries.number, page_hash, access)
        self.table.put(key, location(segment.number, slot))
        self.count_stored(entries, 1)

    def count_stored(self, entries: NamespaceEntries, n_pages: int) -> None:
        entries.n_pages += n_pages
        self.n_pages += n_pages
        self.payload_bytes += n_pages * entries.page_bytes
        if not entries.n_pages:
            self.emptied.add(entries.number)

    def drop(self, entries: NamespaceEntries, page_hash: bytes, loc: int) -> bool:
        """Forget the page if it still is at `loc`."""
        if entries.find(page_hash) != loc:
            return False
        self.table.remove(entries.key(page_hash))
        self._vacate(loc, b"")
        return True

    def _vacate(self, loc: int, successor: bytes) -> None:
        """The page at `loc` is gone, unless it is the one named `successor`, which moves."""
        segment, slot = self.segments[segment_of(loc)], slot_of(loc)
        entries = self.namespaces[segment.owner(slot)]
        page_hash = segment.page_hash(slot)
        segment.drop(slot)
        self.count_stored(entries, -1)
        if page_hash != successor:
            entries.note_dropped(page_hash)

    def drop_pages(self, segment: Segment, slots: Iterable[int]) -> int:
        """Forget the pages in these slots of a segment; returns how many there were."""
        if not self.is_current(segment):
            return 0
        dropped = 0
        for slot in slots:
            if segment.used(slot):
                entries = self.namespaces[segment.owner(slot)]
                loc = location(segment.number, slot)
                dropped += self.drop(entries, segment.page_hash(slot), loc)
        return dropped

    def touch(self, entries: NamespaceEntries, hashes: Iterable[bytes]) -> None:
        """Pages are in use."""
        clock = self.tick()
        for page_hash in hashes:
            found = self.locate(entries, page_hash)
            if found is not None:
                found[0].touch(found[1], clock)

    def clear(self) -> Cleared:
        """Forget everything at once; returns what has to be disposed of."""
        self.generation += 1
        cleared = Cleared(self.segments, self._loose, self.board, self.table)
        self.segments, self._loose = {}, set()
        self.board = SegmentBoard(self.lock)
        self.table = PageTable()
        self.n_pages = self.payload_bytes = 0
        self.emptied.update(self.namespaces)
        for entries in self.namespaces.values():
            entries.note_cleared()
        self.namespaces = {}
        return cleared

    # -- lookups without the lock

    def hashes_of(self, entries: NamespaceEntries) -> list[bytes]:
        """Every page of a namespace, neighbours on disk next to each other."""
        number = entries.number
        return [
            segment.page_hash(slot)
            for segment in sorted(self.segments.values(), key=lambda s: s.number)
            for slot in segment.live_slots()
            if segment.owner(slot) == number
        ]

    def count_prefix(self, entries: NamespaceEntries, hashes: Sequence[bytes]) -> int:
        """How many leading pages are stored."""
        position = 0
        while position < len(hashes):
            loc = entries.find(hashes[position])
            if loc is None:
                return position
            # What was written together lies side by side: looking there is quicker.
            position += 1 + self._count_adjacent(entries.number, loc, hashes, position + 1)
        return position

    def _count_adjacent(self, owner: int, loc: int, hashes: Sequence[bytes], position: int) -> int:
        segment = self.segments.get(segment_of(loc))
        if segment is None:
            return 0
        names, owners, access = segment.hashes, segment.owners, segment.access
        first = slot_of(loc) + 1
        most = min(len(hashes) - position, segment.slots - first)
        n = 0
        while (
            n < most
            and names[(first + n) * ID_BYTES : (first + n + 1) * ID_BYTES] == hashes[position + n]
        ):
            n += 1
        is_ours = (owners[first : first + n] == owner) & (access[first : first + n] > 0)
        return n if is_ours.all() else int(is_ours.argmin())

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
