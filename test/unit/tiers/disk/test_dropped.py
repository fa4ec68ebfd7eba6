"""`drain_dropped`: what the disk has given up since it was last asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from disk_builders import MIB, NAMESPACE, PAGE_BYTES, flip, page_hash, read, segment_files, write

from tiered_kv.tiers.disk import namespace_entries
from tiered_kv.tiers.disk.record import BLOCK_BYTES
from tiered_kv.tiers.disk.store import DiskStore

OpenStore = Callable[..., DiskStore]


def test_reclaimed_pages_are_told_once(open_store: OpenStore) -> None:
    """Whoever removes what it is told from the set of what it wrote knows exactly what is there."""
    ns = open_store(capacity_bytes=6 * MIB).namespace(NAMESPACE, PAGE_BYTES)
    believed: set[bytes] = set()
    for first in range(0, 600, 5):
        write(ns, range(first, first + 5))
        read(ns, [first, 0])
        believed |= {page_hash(seed) for seed in range(first, first + 5)}
        dropped = ns.drain_dropped()
        assert dropped is not None
        assert len(dropped) == len(set(dropped))
        believed -= set(dropped)
        assert believed == set(ns.hashes())
    assert ns.drain_dropped() == []


def test_moved_pages_are_not_dropped(open_store: OpenStore) -> None:
    store = open_store(capacity_bytes=6 * MIB)
    ns = store.namespace(NAMESPACE, 12 << 10)
    for seed in range(5):
        write(ns, [seed, *range(100 * seed + 100, 100 * seed + 119)])
    for first in range(1000, 3000, 20):
        write(ns, range(first, first + 20))
        assert read(ns, range(5)) == 5
    assert store.stats().moved_pages > 0
    dropped = ns.drain_dropped()
    assert dropped is not None
    assert not {page_hash(seed) for seed in range(5)} & set(dropped)


def test_pages_written_again_are_not_dropped(open_store: OpenStore) -> None:
    ns = open_store().namespace(NAMESPACE, PAGE_BYTES)
    write(ns, range(4))
    ns.drop_pages([page_hash(seed) for seed in range(4)])
    write(ns, [1, 2])
    assert ns.drain_dropped() == [page_hash(0), page_hash(3)]


def test_damaged_and_cleared_pages_are_told(open_store: OpenStore, directory: Path) -> None:
    store = open_store()
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    write(ns, range(4))
    flip(segment_files(directory)[0], BLOCK_BYTES + 2 * (BLOCK_BYTES + PAGE_BYTES) + 5000)
    assert read(ns, range(4)) == 2
    assert ns.drain_dropped() == [page_hash(2)]
    store.clear()
    assert ns.drain_dropped() is None, "all of them: nobody lists ten million names"
    assert ns.drain_dropped() == []
    store.clear()
    assert ns.drain_dropped() == [], "there was nothing to clear"


def test_too_many_are_unknown(open_store: OpenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespace_entries, "MAX_DROPPED", 10)
    ns = open_store().namespace(NAMESPACE, PAGE_BYTES)
    write(ns, range(20))
    ns.drop_pages([page_hash(seed) for seed in range(11)])
    ns.drop_pages([page_hash(11)])
    assert ns.drain_dropped() is None
    ns.drop_pages([page_hash(12)])
    assert ns.drain_dropped() == [page_hash(12)]


def test_namespaces_are_told_apart(open_store: OpenStore) -> None:
    store = open_store()
    one, two = store.namespace(NAMESPACE, PAGE_BYTES), store.namespace(bytes(32), PAGE_BYTES)
    write(one, [1])
    write(two, [1, 2])
    one.drop_pages([page_hash(1)])
    assert two.drain_dropped() == []
    assert one.drain_dropped() == [page_hash(1)]
    assert store.namespace(NAMESPACE, PAGE_BYTES).drain_dropped() == []
