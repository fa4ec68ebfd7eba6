"""What is written is read back, equal, on both paths, for any page size and any buffer."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable

import pytest
from disk_builders import (
    MIB,
    NAMESPACE,
    PAGE_BYTES,
    aligned,
    filled,
    page_hash,
    page_payload,
    read,
    write,
)

from tiered_kv.core.errors import DiskTierError
from tiered_kv.tiers.disk.io_path import IoMode
from tiered_kv.tiers.disk.store import DiskStore

OpenStore = Callable[..., DiskStore]


@pytest.mark.parametrize("page_bytes", [1, 100, 4095, 4096, 4097, 23_040, 64 << 10, 1_000_001])
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "exact"])
def test_round_trip(open_store: OpenStore, io_mode: IoMode, page_bytes: int, padded: bool) -> None:
    ns = open_store(io_mode=io_mode).namespace(NAMESPACE, page_bytes)
    length = ns.slot_bytes if padded else page_bytes
    hashes = [page_hash(seed) for seed in range(17)]
    buffers = [filled(seed, page_bytes, length) for seed in range(17)]
    assert ns.write_pages(hashes, buffers) == 17
    assert ns.count_prefix(hashes) == 17
    order = list(range(17))
    random.Random(page_bytes).shuffle(order)
    results = [aligned(length) for _ in order]
    assert ns.read_pages([hashes[i] for i in order], results) == 17
    for i, view in zip(order, results, strict=True):
        assert view[:page_bytes] == page_payload(i, page_bytes)


def test_random_sizes_in_one_directory(open_store: OpenStore, io_mode: IoMode) -> None:
    choose = random.Random(5)
    store = open_store(io_mode=io_mode, capacity_bytes=256 * MIB)
    written = []
    for number in range(12):
        page_bytes = choose.randint(1, 300_000)
        ns = store.namespace(hashlib.sha256(b"%d" % number).digest(), page_bytes)
        seeds = choose.sample(range(1000), 9)
        assert write(ns, seeds) == 9
        written.append((ns, seeds))
    for ns, seeds in written:
        assert read(ns, seeds) == 9
    assert store.stats().pages == 12 * 9


def test_buffers_at_odd_addresses(open_store: OpenStore, io_mode: IoMode) -> None:
    """A read must not write past the view it was given."""
    page_bytes = 23_040
    ns = open_store(io_mode=io_mode).namespace(NAMESPACE, page_bytes)
    hashes = [page_hash(seed) for seed in range(6)]
    area = aligned(7 * page_bytes)
    area[:] = b"\xee" * len(area)
    views = [area[13 + i * page_bytes : 13 + (i + 1) * page_bytes] for i in range(6)]
    for seed, view in enumerate(views):
        view[:] = page_payload(seed, page_bytes)
    assert ns.write_pages(hashes, views) == 6
    area[:] = b"\xee" * len(area)
    assert ns.read_pages(hashes[::2], views[::2]) == 3
    for seed, view in enumerate(views):
        expected = b"\xee" * page_bytes if seed % 2 else page_payload(seed, page_bytes)
        assert view == expected
    assert area[:13] == b"\xee" * 13


def test_read_only_and_typed_buffers_can_be_written(open_store: OpenStore, io_mode: IoMode) -> None:
    ns = open_store(io_mode=io_mode).namespace(NAMESPACE, 8192)
    assert ns.write_pages([page_hash(1)], [memoryview(page_payload(1, 8192))]) == 1
    typed = filled(2, 8192).cast("Q").cast("B").cast("h")
    assert ns.write_pages([page_hash(2)], [typed]) == 1
    assert read(ns, [1, 2]) == 2


def test_large_batch_is_coalesced_and_split(open_store: OpenStore, io_mode: IoMode) -> None:
    """More pages than one system call takes, more bytes than one acknowledgement covers."""
    store = open_store(io_mode=io_mode, capacity_bytes=256 * MIB)
    ns = store.namespace(NAMESPACE, 5000)
    seeds = list(range(1500))
    assert write(ns, seeds) == 1500
    assert read(ns, seeds) == 1500


def test_stored_pages_are_skipped(open_store: OpenStore) -> None:
    store = open_store()
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    assert write(ns, [1, 2, 3]) == 3
    assert write(ns, [2, 3, 4, 4]) == 1
    assert store.stats().pages == 4
    assert store.stats().writes == 4


def test_read_ends_at_the_first_missing_page(open_store: OpenStore) -> None:
    store = open_store()
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    write(ns, [1, 2, 4])
    hashes = [page_hash(seed) for seed in (1, 2, 3, 4)]
    assert ns.count_prefix(hashes) == 2
    assert read(ns, [1, 2, 3, 4]) == 2
    assert read(ns, [3]) == 0
    assert store.stats().read_misses == 3
    assert [ns.contains(h) for h in hashes] == [True, True, False, True]


def test_empty_batches(open_store: OpenStore) -> None:
    ns = open_store().namespace(NAMESPACE, PAGE_BYTES)
    assert ns.write_pages([], []) == ns.read_pages([], []) == ns.count_prefix([]) == 0


def test_namespaces_do_not_see_each_other(open_store: OpenStore) -> None:
    store = open_store()
    one = store.namespace(NAMESPACE, PAGE_BYTES, "one")
    other = store.namespace(hashlib.sha256(b"another model").digest(), PAGE_BYTES, "other")
    write(one, [1, 2])
    assert not other.contains(page_hash(1))
    assert read(other, [1]) == 0
    assert write(other, [1]) == 1
    assert (len(one), len(other)) == (2, 1)


def test_same_namespace_twice_is_the_same(open_store: OpenStore) -> None:
    store = open_store()
    write(store.namespace(NAMESPACE, PAGE_BYTES), [1])
    assert read(store.namespace(NAMESPACE, PAGE_BYTES), [1]) == 1


def test_other_page_size_for_a_namespace_is_refused(open_store: OpenStore) -> None:
    """As long as somebody uses it, or it has pages."""
    store = open_store()
    in_use = store.namespace(NAMESPACE, PAGE_BYTES)
    with pytest.raises(DiskTierError, match="65536 bytes, not 4096"):
        store.namespace(NAMESPACE, 4096)
    write(in_use, [1])
    del in_use
    with pytest.raises(DiskTierError, match="65536 bytes, not 4096"):
        store.namespace(NAMESPACE, 4096)
    write(store.namespace(NAMESPACE, PAGE_BYTES), [1])
    store.close()
    with pytest.raises(DiskTierError, match="65536 bytes, not 4096"):
        open_store().namespace(NAMESPACE, 4096)


def test_callers_mistakes_raise(open_store: OpenStore) -> None:
    store = open_store()
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    with pytest.raises(ValueError, match="2 hashes but 1 buffers"):
        ns.write_pages([page_hash(1), page_hash(2)], [aligned(PAGE_BYTES)])
    with pytest.raises(ValueError, match="a buffer has 4096 bytes"):
        ns.read_pages([page_hash(1)], [aligned(4096)])
    with pytest.raises(ValueError, match="a page hash has 32 bytes, not 5"):
        ns.write_pages([b"short"], [aligned(PAGE_BYTES)])
    with pytest.raises(ValueError, match="namespace id has 32 bytes"):
        store.namespace(b"short", PAGE_BYTES)


def test_statistics(open_store: OpenStore, io_mode: IoMode) -> None:
    store = open_store(io_mode=io_mode)
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    write(ns, range(10))
    read(ns, range(4))
    stats = store.stats()
    assert (stats.pages, stats.bytes_used) == (10, 10 * PAGE_BYTES)
    assert (stats.writes, stats.write_bytes) == (10, 10 * PAGE_BYTES)
    assert (stats.reads, stats.read_bytes, stats.read_misses) == (4, 4 * PAGE_BYTES, 0)
    assert stats.direct_io is (io_mode is IoMode.DIRECT)
    assert stats.segments == 1
    assert 0 < stats.bytes_on_disk <= stats.capacity == 128 * MIB
    assert not stats.degraded


def test_clear(open_store: OpenStore, directory: object) -> None:
    store = open_store()
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    write(ns, range(20))
    store.clear()
    assert (len(ns), store.stats().pages, store.stats().segments) == (0, 0, 0)
    assert read(ns, [1]) == 0
    assert write(ns, [1]) == 1
    store.close()
    reopened = open_store().namespace(NAMESPACE, PAGE_BYTES)
    assert len(reopened) == 1
    assert read(reopened, [1]) == 1


def test_closed_store_does_nothing(open_store: OpenStore) -> None:
    store = open_store()
    ns = store.namespace(NAMESPACE, PAGE_BYTES)
    write(ns, [1])
    store.close()
    store.close()
    assert write(ns, [2]) == 0
    assert read(ns, [1]) == 0


@pytest.mark.parametrize("sync_writes", [True, False])
def test_sync_writes(open_store: OpenStore, io_mode: IoMode, sync_writes: bool) -> None:
    ns = open_store(io_mode=io_mode, sync_writes=sync_writes).namespace(NAMESPACE, PAGE_BYTES)
    assert write(ns, range(5)) == 5
    assert read(ns, range(5)) == 5
