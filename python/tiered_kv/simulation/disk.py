"""Which pages the simulated disk holds: the disk tier's own books and rules, without its files.

Budget, segments, the order in which they are given up and what is carried over from them are the
server's (`tiers/disk/`). What the keeper does on a thread of its own is done at once here, as soon
as it is needed, and takes no time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tiered_kv.core.ids import PageHash
from tiered_kv.forest.key import namespace_hash
from tiered_kv.tiers.disk.budget import Budget
from tiered_kv.tiers.disk.catalog import Catalog
from tiered_kv.tiers.disk.namespace_entries import NamespaceEntries
from tiered_kv.tiers.disk.reclaim import choose_survivors, choose_victim
from tiered_kv.tiers.disk.segment import Segment
from tiered_kv.tiers.disk.space import SpaceManager


class LateCatalog(Catalog):
    """Notes uses when somebody looks at their order, which is seldom: nothing else differs.

    Each page for itself took most of a run's time where prompts are long.
    """

    def __init__(self) -> None:
        super().__init__()
        self._used: dict[PageHash, int] = {}
        """When pages were used last that `_entries` says nothing of yet."""
        self._entries: NamespaceEntries | None = None

    def touch(self, entries: NamespaceEntries, hashes: Iterable[PageHash]) -> None:
        """See `Catalog.touch`. Of one namespace only."""
        self._entries = entries
        self._used.update(dict.fromkeys(hashes, self.tick()))

    def note_uses(self) -> None:
        """Segments know of all uses from now on; who looks at them calls this first."""
        for page_hash, clock in self._used.items():
            assert self._entries is not None
            found = self.locate(self._entries, page_hash)
            # What was written later was not there to be used.
            if found is not None and found[0].used(found[1]) >> 1 < clock:
                found[0].touch(found[1], clock)
        self._used.clear()

    def begin_epoch(self) -> None:
        """See `Catalog.begin_epoch`."""
        self.note_uses()
        super().begin_epoch()


class SimulatedDisk:
    """Pages of `page_bytes` in at most `capacity_bytes`, by name.

    Raises DiskTierError if there is not room for two.
    """

    def __init__(self, capacity_bytes: int, page_bytes: int) -> None:
        budget = Budget(capacity_bytes)
        self._catalog = LateCatalog()
        self._entries = self._catalog.open_namespace(namespace_hash("simulation"), page_bytes)
        self._record_bytes = self._entries.record_bytes
        budget.slots_per_segment(self._record_bytes)
        self._space = SpaceManager(
            self._catalog, budget, wake_keeper=self._serve_needs, is_stalled=lambda: True
        )

    def __len__(self) -> int:
        return self._catalog.n_pages

    def known(self, hashes: Sequence[PageHash], /) -> int:
        """How many leading pages are there."""
        return self._catalog.count_prefix(self._entries, hashes)

    def put(self, hashes: Sequence[PageHash]) -> int:
        """Stores the pages that are not there; returns how many leading ones are there now."""
        catalog, entries, space = self._catalog, self._entries, self._space
        with catalog.lock:
            mine, _ = catalog.claim(entries, hashes)
        n_at_once = space.pages_per_batch(self._record_bytes)
        for start in range(0, len(mine), n_at_once):
            chunk = mine[start : start + n_at_once]
            slots = space.allocate(self._record_bytes, len(chunk))
            with catalog.lock:
                access = catalog.tick() << 1
                catalog.register(entries)
                for position, (segment, slot) in zip(chunk, slots, strict=False):
                    catalog.put(entries, hashes[position], segment, slot, access)
            space.finish_writes(slots)
            if len(slots) < len(chunk):
                break
        with catalog.lock:
            catalog.release(entries, [hashes[position] for position in mine])
        while space.sizes_short_of_spares() and self._make_room():
            pass
        return self.known(hashes)

    def touch(self, hashes: Iterable[PageHash], /) -> None:
        """Pages are read, or used in a nearer tier."""
        with self._catalog.lock:
            self._catalog.touch(self._entries, hashes)

    @property
    def has_dropped(self) -> bool:
        """Whether `drain_dropped` has something to say."""
        return self._entries.has_dropped

    def drain_dropped(self) -> list[PageHash] | None:
        """Pages that are there no more, since the last call; None: too many to remember."""
        with self._catalog.lock:
            return self._entries.drain_dropped()

    # -- what the keeper does -----------------------------------------------------------------

    def _serve_needs(self) -> None:
        """A write found no slots: some are made before it goes on.

        Called with the catalog's lock held as well, but not while there is a need.
        """
        for record_bytes in list(self._space.needs):
            has_room = True
            while has_room and not self._space.has_free(record_bytes):
                has_room = self._make_room()
            self._space.end_need(record_bytes, has_room=has_room)

    def _make_room(self) -> bool:
        """One step towards a free segment; False if nothing can be done."""
        catalog, space = self._catalog, self._space
        if slots := space.charge_new(self._record_bytes):
            number = catalog.next_segment
            catalog.next_segment += 1
            segment = Segment(number, self._record_bytes, slots, catalog.ages)
            space.add_new(segment, catalog.generation)
            return True
        catalog.note_uses()
        others = space.partly_filled(self._record_bytes)
        victim = choose_victim(catalog.board, others, catalog.ages, catalog.clock)
        if victim is None or not space.begin_reclaim(victim):
            return False
        self._carry_over(victim)
        space.drop_pages(victim)
        space.end_reclaim(victim, is_empty=True)
        return True

    def _carry_over(self, victim: Segment) -> None:
        """Move the pages that deserve it."""
        catalog, space = self._catalog, self._space
        slots = choose_survivors(victim, space.room_for_survivors(self._record_bytes))
        while slots:
            targets = space.take_for_survivors(self._record_bytes, len(slots))
            with catalog.lock:
                for slot, (segment, target) in zip(slots, targets, strict=False):
                    access = victim.used(slot) & ~1
                    name = victim.page_hash(slot)
                    catalog.put(self._entries, name, segment, target, access)
            space.finish_writes(targets)
            slots = slots[len(targets) :]
            if not targets:
                return
