"""What must hold of the rig (`tier_rig.py`), whatever happened to it."""

from __future__ import annotations

from typing import Any

from tiered_kv.core.ids import Tier
from tiered_kv.forest.residency import Residency
from tiered_kv.tiers.context import device_slots_of, host_pages_of


class RigChecks:
    """Accounts for every slot of both pools, and knows every page's bytes."""

    # The rig's own, which this is a part of.
    forest: Any
    allocator: Any
    hierarchy: Any
    context: Any
    host: Any
    host_codec: Any
    disk: Any
    events: Any
    requests: Any
    known_hashes: Any
    in_flight: Any
    kv: Any
    _pages: Any

    def check(self) -> None:
        """Everything that must hold between any two calls, whatever is in flight."""
        self.forest.check_integrity()
        self._check_device_slots()
        self._check_host_slots()
        self._check_held_pages()
        self._check_bytes()
        for node in self.forest.nodes():
            is_lasting = node.root.tree_key.is_lasting
            for cold in self.hierarchy.colds:
                is_above = node.state(cold.tier) is Residency.ABSENT
                assert is_lasting or is_above, f"{node!r} has no name"

    def _check_device_slots(self) -> None:
        held: list[int] = list(self.allocator.free_pages)
        for node in self.forest.nodes():
            if node.state(Tier.DEVICE) is not Residency.ABSENT:
                held += self.allocator.pages_of(device_slots_of(node))
        for request in self.requests:
            held += self.allocator.pages_of(request.slots[request.n_protected :])
        assert sorted(held) == list(range(1, self.allocator.n_pages + 1)), (
            "device pages were lost or handed out twice"
        )

    def _check_host_slots(self) -> None:
        held: list[int] = []
        for node in self.forest.nodes():
            if node.state(Tier.HOST) is not Residency.ABSENT:
                held += host_pages_of(node).tolist()
        n_flushes = self.context.epoch.flushes
        behind: set[int] = set()
        for cold in self.hierarchy.colds:
            for job in (*cold.writes.queue.open_jobs, *cold.reads.open_jobs):
                if job.epoch.flushes != n_flushes:
                    behind |= set(job.host_pages.tolist())
        held += behind
        assert len(set(held)) == len(held), "a host page belongs to two nodes"
        assert len(held) + self.host.n_free == self.host.n_pages, "host pages were lost"

    def _check_held_pages(self) -> None:
        """What waiting requests hold counts once, is within its share, and cannot be evicted."""
        order, tickets = self.hierarchy.prefetch._order, self.hierarchy.prefetch.tickets
        held = {int(page) for pages in order._held.values() for page in pages}
        assert order.room_pages - order.free_pages == len(held) <= order.room_pages
        assert set(order._held) == {t.name for t in tickets.values() if t.pinned is not None}
        pinned = {
            int(page)
            for node in self.forest.nodes()
            if node.pins(Tier.HOST) and node.state(Tier.HOST) is not Residency.ABSENT
            for page in host_pages_of(node)
        }
        assert held <= pinned

    def _check_bytes(self) -> None:
        for node in self.forest.nodes():
            if node.state(Tier.DEVICE) is Residency.RESIDENT:
                pages = self.allocator.pages_of(device_slots_of(node))
                for page_hash, page in zip(node.page_hashes, pages, strict=True):
                    found = b"".join(buffer[page].tobytes() for buffer in self._pages)
                    assert found == self.kv(page_hash), f"{node!r} is wrong on the device"
            if node.state(Tier.HOST) is Residency.RESIDENT:
                for page_hash, page in zip(node.page_hashes, host_pages_of(node), strict=True):
                    found = self._from_host_bytes(self.host.pages[page].tobytes())
                    assert found == self.kv(page_hash), f"{node!r} is wrong on the host"

    def _from_host_bytes(self, slot: bytes) -> bytes:
        """A page as the device has it, of a host slot's bytes."""
        page = slot[: self.host.page_format.page_bytes]
        return page if self.host_codec is None else self.host_codec.decode(page)

    def check_disk(self) -> None:
        """Every page this rig has met and the disk claims to have is right."""
        namespace = getattr(self.disk, "namespace", self.disk)
        for page_hash in sorted(self.known_hashes):
            if namespace.contains(page_hash):
                buffer = memoryview(bytearray(self.host.page_format.page_bytes))
                assert namespace.read_pages([page_hash], [buffer]) == 1
                page = self._from_host_bytes(bytes(buffer))
                assert page == self.kv(page_hash), "a page is wrong on disk"

    def check_idle(self) -> None:
        """With no request and nothing in flight, nothing is pinned or half done."""
        self.check()
        assert self.in_flight == 0
        assert not self.requests
        for node in self.forest.nodes():
            for tier in self.forest.tiers:
                assert node.pins(tier) == 0, f"{node!r} is still pinned in {tier.name}"
                assert node.op(tier) is None, f"{node!r} is still on its way to {tier.name}"
        for tier in (Tier.DEVICE, Tier.HOST):
            assert self.forest.protected_tokens(tier) == 0
            assert sorted(self.events.held.get(tier, [])) == sorted(
                page_hash
                for node in self.forest.nodes()
                if node.state(tier) is Residency.RESIDENT
                for page_hash in node.page_hashes
            ), f"the events about {tier.name} do not add up"
        for cold in self.hierarchy.colds:
            if cold.dropped.is_looking or cold.dropped._news != set():
                continue  # nodes follow what it gave up in later polls
            held = set(self.events.held.get(cold.tier, []))
            for node in self.forest.nodes():
                if node.state(cold.tier) is Residency.RESIDENT:
                    assert held.issuperset(node.page_hashes), f"{node!r}: no event of {cold.name}"
