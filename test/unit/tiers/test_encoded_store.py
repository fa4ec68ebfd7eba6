"""A disk that keeps pages in another format than the host, over the real store.

What comes back is compared with `sgl_kernel_ext`'s reference.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from support.damage import damage_segments
from support_tiers.page_codec import PageCodec, page_layout
from support_tiers.shared_blobs import SharedBlobs
from tiered_kv.core.errors import DiskTierError
from tiered_kv.core.ids import Tier
from tiered_kv.tiers import encoded_store as encoded_store_module
from tiered_kv.tiers.disk.namespace import DiskNamespace
from tiered_kv.tiers.disk.store import DiskStore
from tiered_kv.tiers.encoded_store import EncodedDisk, EncodedStore
from tiered_kv.tiers.page_format import PageFormat
from tiered_kv.tiers.page_store import StoreTraits
from tiered_kv.tiers.shared.envelope import HEADER_BYTES
from tiered_kv.tiers.shared.link import StoreLink
from tiered_kv.tiers.shared.object_store import ObjectStore

pytestmark = pytest.mark.timeout(60)

PAGE_SIZE = 16
N_LAYERS = 2
NAMESPACE = hashlib.sha256(b"a model").digest()
PAIRS = [("raw", "fp8"), ("raw", "int2"), ("raw", "kitty"), ("fp8", "int4"), ("int4", "int2")]


def layout_named(name: str) -> object:
    return page_layout(name, PAGE_SIZE, N_LAYERS, n_heads=2, head_dim=32)


@pytest.fixture(autouse=True)
def three_pages_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = layout_named("raw")
    monkeypatch.setattr(encoded_store_module, "BLOCK_BYTES", 3 * raw.page_bytes)


@pytest.fixture
def open_store(tmp_path: Path) -> Iterator[Callable[[], DiskStore]]:
    stores: list[DiskStore] = []

    def open_one() -> DiskStore:
        stores.append(DiskStore.open(tmp_path, capacity_bytes=32 << 20))
        return stores[-1]

    yield open_one
    for store in stores:
        store.close()


class Bench:
    """Pages as the host has them, and where they are on disk in another format."""

    def __init__(self, store: DiskStore, host: str, stored: str, n_threads: int = 1) -> None:
        self.host = PageCodec(layout_named(host))
        self.stored = PageCodec(layout_named(stored))
        self.namespace: DiskNamespace = store.namespace(NAMESPACE, self.stored.layout.page_bytes)
        self.disk = EncodedDisk(self.namespace, self.host.layout, self.stored.layout, n_threads)
        self.slot_bytes = PageFormat.of_layout(self.host.layout).slot_bytes

    def on_host(self, seed: int) -> bytes:
        """What a host slot holds of the page of this seed."""
        elements = 2 * N_LAYERS * PAGE_SIZE * 2 * 32
        values = np.random.default_rng(seed).standard_normal(elements).astype(np.float32)
        # bfloat16 by truncation.
        page = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
        return page if self.host.layout.format == "raw" else self.host.encode(page)

    def expected(self, seed: int) -> bytes:
        """What the host gets back of it, as the device will have it."""
        return self.as_device(self.host_bytes_of(self.stored_bytes(seed)))

    def stored_bytes(self, seed: int) -> bytes:
        return self.stored.encode(self.as_device(self.on_host(seed)))

    def host_bytes_of(self, stored: bytes) -> bytes:
        page = self.stored.decode(stored)
        return page if self.host.layout.format == "raw" else self.host.encode(page)

    def as_device(self, page: bytes) -> bytes:
        return page if self.host.layout.format == "raw" else self.host.decode(page)

    def slot(self, page: bytes = b"") -> bytearray:
        return bytearray(page.ljust(self.slot_bytes, b"\xee"))

    def write(self, seeds: Sequence[int]) -> int:
        slots = [memoryview(self.slot(self.on_host(seed))) for seed in seeds]
        return self.disk.write_pages([key(seed) for seed in seeds], slots)

    def read(self, seeds: Sequence[int]) -> list[bytes]:
        """The pages that came, as the device will have them."""
        slots = [self.slot() for _ in seeds]
        n = self.disk.read_pages([key(s) for s in seeds], [memoryview(s) for s in slots])
        page_bytes = self.host.layout.page_bytes
        for slot in slots:
            assert slot[page_bytes:] == b"\xee" * (self.slot_bytes - page_bytes)
        return [self.as_device(bytes(slot[:page_bytes])) for slot in slots[:n]]


def key(seed: int) -> bytes:
    return hashlib.sha256(bytes([seed])).digest()


@pytest.mark.parametrize(("host", "stored"), PAIRS)
def test_pages_come_back_as_the_reference_says_also_after_a_restart(
    open_store: Callable[[], DiskStore], host: str, stored: str
) -> None:
    store = open_store()
    bench = Bench(store, host, stored)
    seeds = range(8)
    assert bench.write(seeds) == 8
    assert bench.disk.count_prefix([key(seed) for seed in range(9)]) == 8
    expected = [bench.expected(seed) for seed in seeds]
    assert bench.read(seeds) == expected
    store.close()
    again = Bench(open_store(), host, stored)
    assert len(again.disk) == 8
    assert again.read(seeds) == expected
    assert expected[0] != bench.as_device(bench.on_host(0)), "this lost nothing: no test"


@pytest.mark.parametrize("n_threads", [2, 3, 5])
def test_several_threads_convert_the_same(
    open_store: Callable[[], DiskStore], n_threads: int
) -> None:
    bench = Bench(open_store(), "raw", "int4", n_threads)
    for seeds in (range(11), range(11, 12), range(12, 16)):
        assert bench.write(seeds) == len(seeds)
    for seeds in (range(16), range(1), range(4, 9)):
        assert bench.read(seeds) == [bench.expected(seed) for seed in seeds]


def test_only_new_pages_are_converted(open_store: Callable[[], DiskStore]) -> None:
    bench = Bench(open_store(), "raw", "int4")
    assert bench.write([1, 3]) == 2
    assert bench.write([0, 1, 2, 3, 4]) == 3
    assert bench.read(range(5)) == [bench.expected(seed) for seed in range(5)]


@pytest.mark.parametrize("missing", [0, 2, 3, 7])
def test_a_missing_page_ends_what_is_read(
    open_store: Callable[[], DiskStore], missing: int
) -> None:
    bench = Bench(open_store(), "raw", "fp8")
    bench.write([seed for seed in range(8) if seed != missing])
    assert bench.read(range(8)) == [bench.expected(seed) for seed in range(missing)]
    assert not bench.disk.contains(key(missing))


def test_a_damaged_page_is_a_miss(open_store: Callable[[], DiskStore], tmp_path: Path) -> None:
    store = open_store()
    bench = Bench(store, "raw", "fp8")
    bench.write(range(8))
    store.close()
    assert damage_segments(tmp_path) > 0
    again = Bench(open_store(), "raw", "fp8")
    read = again.read(range(8))
    assert len(read) < 8
    assert read == [bench.expected(seed) for seed in range(len(read))]


def test_a_page_is_never_read_as_one_of_another_format(
    open_store: Callable[[], DiskStore],
) -> None:
    """Were two formats given one name in spite of the fingerprint, the sizes would still tell."""
    store = open_store()
    Bench(store, "raw", "fp8").write([0])
    with pytest.raises(DiskTierError, match="two layouts must not share one namespace id"):
        Bench(store, "raw", "int4")


def test_pages_given_up_are_told(open_store: Callable[[], DiskStore]) -> None:
    bench = Bench(open_store(), "raw", "fp8")
    bench.write([0])
    bench.disk.touch([key(0)])
    bench.namespace.drop_pages([key(0)])
    assert bench.disk.drain_dropped() == [key(0)]


# -- a store that must be asked


class SharedBench(Bench):
    """The same over a store of blobs."""

    def __init__(self, store: DiskStore, host: str, stored: str, n_threads: int = 1) -> None:
        super().__init__(store, host, stored, n_threads)
        self.blobs = SharedBlobs()
        page_format = PageFormat.of_layout(self.stored.layout)
        traits = StoreTraits(Tier.STORE, page_format, knows_locally=False, is_shared=True)
        pages = ObjectStore(StoreLink(self.blobs, now=lambda: 0.0), NAMESPACE, traits)
        self.store = EncodedStore(pages, self.host.layout, self.stored.layout, n_threads)

    def put(self, seeds: Sequence[int]) -> int:
        slots = [memoryview(self.slot(self.on_host(seed))) for seed in seeds]
        return self.store.put([key(seed) for seed in seeds], slots)

    def get(self, seeds: Sequence[int]) -> list[bytes]:
        slots = [self.slot() for _ in seeds]
        n = self.store.get([key(seed) for seed in seeds], [memoryview(slot) for slot in slots])
        page_bytes = self.host.layout.page_bytes
        return [self.as_device(bytes(slot[:page_bytes])) for slot in slots[:n]]


@pytest.mark.parametrize(("host", "stored"), PAIRS)
def test_a_shared_store_has_pages_in_its_own_format(
    open_store: Callable[[], DiskStore], host: str, stored: str
) -> None:
    bench = SharedBench(open_store(), host, stored)
    assert bench.put(range(7)) == 7
    assert bench.get(range(7)) == [bench.expected(seed) for seed in range(7)]
    assert bench.store.lookup([key(seed) for seed in range(9)]) == 7
    sizes = {len(blob) for blob in bench.blobs.blobs.values()}
    assert sizes == {HEADER_BYTES + bench.stored.layout.page_bytes}


def test_of_a_shared_store_leading_pages_count(open_store: Callable[[], DiskStore]) -> None:
    bench = SharedBench(open_store(), "raw", "fp8")
    n_written = bench.blobs.writes
    assert bench.put([0, 1]) == 2
    n_written.error = OSError("what is there is not written again")
    assert bench.put([0, 1]) == 2
    assert bench.put([0, 1, 2]) == 2
    assert bench.get([0, 1, 2]) == [bench.expected(seed) for seed in (0, 1)]
    assert bench.get([2]) == []
    bench.blobs.lie = lambda _, blob: blob[:-1] + b"?"
    assert bench.get([0]) == []
