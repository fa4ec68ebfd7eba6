"""What the hierarchy expects of a disk tier: of the real one, and of the reference in memory."""

from __future__ import annotations

import hashlib
import mmap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tiered_kv.core.errors import DiskTierError
from tiered_kv.tiers.disk.store import DiskStore
from tiered_kv.tiers.in_memory import InMemoryStore

pytestmark = pytest.mark.timeout(60)

PAGE_BYTES = 5000
NAMESPACE = hashlib.sha256(b"a model").digest()
OTHER = hashlib.sha256(b"another model").digest()

Store = InMemoryStore | DiskStore


@pytest.fixture(params=["in memory", "disk"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    opened: Store
    if request.param == "disk":
        opened = DiskStore.open(tmp_path / "disk", capacity_bytes=64 << 20)
    else:
        opened = InMemoryStore(64 << 20)
    yield opened
    opened.close()


def name(n: int) -> bytes:
    return hashlib.sha256(f"page {n}".encode()).digest()


def payload(n: int) -> bytes:
    return hashlib.shake_128(f"page {n}".encode()).digest(PAGE_BYTES)


def buffers(*pages: int, n_bytes: int = PAGE_BYTES) -> list[memoryview]:
    """Aligned buffers that start with these pages' bytes."""
    made = []
    for n in pages:
        view = memoryview(mmap.mmap(-1, n_bytes))
        view[:PAGE_BYTES] = payload(n)
        made.append(view)
    return made


def names(*pages: int) -> list[bytes]:
    return [name(n) for n in pages]


def read(store: Store, *pages: int) -> tuple[int, list[bytes]]:
    """How many leading pages were read, and their bytes."""
    into = [memoryview(mmap.mmap(-1, PAGE_BYTES)) for _ in pages]
    n = store.namespace(NAMESPACE, PAGE_BYTES).read_pages(names(*pages), into)
    return n, [bytes(view) for view in into[:n]]


def test_what_was_written_is_read(store: Store) -> None:
    pages = store.namespace(NAMESPACE, PAGE_BYTES)
    assert pages.page_bytes == PAGE_BYTES
    assert pages.slot_bytes == 8192
    assert len(pages) == 0
    assert pages.write_pages(names(1, 2, 3), buffers(1, 2, 3)) == 3
    assert len(pages) == 3
    assert read(store, 3, 1) == (2, [payload(3), payload(1)])


def test_stored_pages_are_skipped_and_keep_their_bytes(store: Store) -> None:
    pages = store.namespace(NAMESPACE, PAGE_BYTES)
    assert pages.write_pages(names(1), buffers(1)) == 1
    assert pages.write_pages(names(1, 2), buffers(7, 2)) == 1
    assert read(store, 1) == (1, [payload(1)])


def test_contains_and_count_prefix(store: Store) -> None:
    pages = store.namespace(NAMESPACE, PAGE_BYTES)
    pages.write_pages(names(1, 2, 4), buffers(1, 2, 4))
    assert pages.contains(name(2))
    assert not pages.contains(name(3))
    assert pages.count_prefix(names(1, 2, 3, 4)) == 2
    assert pages.count_prefix(names(3, 1)) == 0
    assert pages.count_prefix([]) == 0


def test_a_miss_ends_the_prefix_of_a_read(store: Store) -> None:
    pages = store.namespace(NAMESPACE, PAGE_BYTES)
    pages.write_pages(names(1, 3), buffers(1, 3))
    assert read(store, 1, 2, 3) == (1, [payload(1)])
    assert read(store, 2, 1) == (0, [])


def test_padded_buffers(store: Store) -> None:
    pages = store.namespace(NAMESPACE, PAGE_BYTES)
    pages.write_pages(names(1), buffers(1, n_bytes=pages.slot_bytes))
    (into,) = buffers(9, n_bytes=pages.slot_bytes)
    assert pages.read_pages(names(1), [into]) == 1
    assert bytes(into[:PAGE_BYTES]) == payload(1)


def test_namespaces_are_apart(store: Store) -> None:
    store.namespace(NAMESPACE, PAGE_BYTES).write_pages(names(1), buffers(1))
    assert not store.namespace(OTHER, PAGE_BYTES).contains(name(1))
    assert store.namespace(NAMESPACE, PAGE_BYTES, "the same").contains(name(1))


def test_a_namespace_has_one_page_size(store: Store) -> None:
    store.namespace(NAMESPACE, PAGE_BYTES).write_pages(names(1), buffers(1))
    with pytest.raises(DiskTierError, match="two layouts"):
        store.namespace(NAMESPACE, PAGE_BYTES + 1)


@pytest.mark.parametrize(
    ("hashes", "views", "sentence"),
    [
        (names(1, 2), buffers(1), "2 hashes but 1 buffers"),
        ([b"short"], buffers(1), "32 bytes, not 5"),
        (names(1), [memoryview(bytearray(PAGE_BYTES - 1))], "4999 bytes, a page 5000"),
    ],
)
def test_wrong_arguments_are_refused(
    store: Store, hashes: list[bytes], views: list[memoryview], sentence: str
) -> None:
    pages = store.namespace(NAMESPACE, PAGE_BYTES)
    with pytest.raises(ValueError, match=sentence):
        pages.write_pages(hashes, views)
    with pytest.raises(ValueError, match=sentence):
        pages.read_pages(hashes, views)


def test_clear(store: Store) -> None:
    pages = store.namespace(NAMESPACE, PAGE_BYTES)
    pages.write_pages(names(1, 2), buffers(1, 2))
    store.clear()
    assert not pages.contains(name(1))
    assert read(store, 1) == (0, [])
    assert pages.write_pages(names(1), buffers(1)) == 1
    assert read(store, 1) == (1, [payload(1)])


def test_a_closed_store_does_nothing(store: Store) -> None:
    pages = store.namespace(NAMESPACE, PAGE_BYTES)
    pages.write_pages(names(1), buffers(1))
    store.close()
    store.close()
    assert pages.write_pages(names(2), buffers(2)) == 0
    assert pages.read_pages(names(1), buffers(9)) == 0


def test_several_threads(store: Store) -> None:
    """Every page is acknowledged exactly once, and read back right."""
    pages = store.namespace(NAMESPACE, PAGE_BYTES)
    counts: list[int] = []

    def work(first: int) -> None:
        for n in range(first, first + 30):
            counts.append(pages.write_pages(names(n), buffers(n)))
            assert pages.contains(name(n))

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 10, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (sum(counts), len(pages)) == (50, 50)
    assert read(store, *range(50)) == (50, [payload(n) for n in range(50)])


# -- the reference alone: exactly least recently used ----------------------------------------------


def test_the_page_used_longest_ago_makes_room() -> None:
    store = InMemoryStore(capacity_bytes=3 * 8192)
    pages = store.namespace(NAMESPACE, PAGE_BYTES)
    pages.write_pages(names(1, 2, 3), buffers(1, 2, 3))
    assert read(store, 1)[0] == 1
    pages.write_pages(names(4), buffers(4))
    assert [n for n in (1, 2, 3, 4) if pages.contains(name(n))] == [1, 3, 4]
    other = store.namespace(OTHER, PAGE_BYTES)
    other.write_pages(names(5, 6), buffers(5, 6))
    assert (len(pages), len(other)) == (1, 2)


def test_a_page_larger_than_the_capacity_is_refused() -> None:
    with pytest.raises(DiskTierError, match="does not fit"):
        InMemoryStore(capacity_bytes=8191).namespace(NAMESPACE, PAGE_BYTES)
