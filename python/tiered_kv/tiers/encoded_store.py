"""A cold store where it keeps pages in another format than the host: converts on the way.

A block of pages at a time, beside the threads of the store's I/O: the host keeps its slots, the
store sees pages of its own format only. What is wrong there is found there, by the checksum over
the stored bytes, and is a miss here as it is without conversion.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from sgl_kernel_ext.formats import Format, PageLayout
from tiered_kv.core.ids import PageHash
from tiered_kv.tiers.codec import PageTranscoder, use_one_thread
from tiered_kv.tiers.cold.local_pages import LocalPages
from tiered_kv.tiers.disk.buffers import AlignedBuffer
from tiered_kv.tiers.page_format import PageFormat
from tiered_kv.tiers.page_store import PageStore, StoreTraits

#: Most bytes of pages, as the device has them, that are converted at a time.
BLOCK_BYTES = 16 << 20


class _Direction:
    """What converting one way needs, kept: the first touch of fresh memory is slow."""

    def __init__(
        self, source: PageLayout, target: PageLayout, n_pages: int, n_threads: int
    ) -> None:
        self.lock = threading.Lock()
        self.source = _Rows(source, n_pages)
        self.target = _Rows(target, n_pages)
        part_pages = -(-n_pages // n_threads)
        self._transcoders = [PageTranscoder(source, target, part_pages) for _ in range(n_threads)]
        self._threads = ThreadPoolExecutor(n_threads, "tiered-kv-convert", use_one_thread)

    def convert(self, n_pages: int) -> None:
        """The first `n_pages` rows of `source` into those of `target`."""
        step = max(1, -(-n_pages // len(self._transcoders)))
        parts = [slice(at, min(at + step, n_pages)) for at in range(0, n_pages, step)]
        converted = [
            self._threads.submit(
                transcoder.convert, self.source.tensor[part], self.target.tensor[part]
            )
            for transcoder, part in zip(self._transcoders, parts, strict=False)
        ]
        for part_converted in converted:
            part_converted.result()


class _Rows:
    """`n_pages` slots of a format, aligned for O_DIRECT."""

    def __init__(self, layout: PageLayout, n_pages: int) -> None:
        slot_bytes = PageFormat.of_layout(layout).slot_bytes
        self._buffer = AlignedBuffer(n_pages * slot_bytes)
        self.page_bytes = layout.page_bytes
        self.array = np.frombuffer(self._buffer.view, dtype=np.uint8).reshape(n_pages, slot_bytes)
        self.tensor = torch.from_numpy(self.array)

    def views(self, n_pages: int) -> list[memoryview]:
        return [memoryview(row) for row in self.array[:n_pages]]


class _Converter:
    """Pages between slots of the layout `host` and pages of the layout `stored`.

    One thread at a time encodes, and one decodes. n_threads: how many convert each way.
    """

    def __init__(self, host: PageLayout, stored: PageLayout, n_threads: int) -> None:
        device = PageLayout.of(Format.RAW, host.page_size, [b.spec for b in host.buffers])
        self.n_pages = n_threads * max(1, BLOCK_BYTES // device.page_bytes // n_threads)
        self.writing = _Direction(host, stored, self.n_pages, n_threads)
        self.reading = _Direction(stored, host, self.n_pages, n_threads)

    def encode(self, buffers: Sequence[memoryview]) -> list[memoryview]:
        """At most `n_pages`; what is returned holds them until the next call."""
        rows = self.writing.source
        for row, buffer in zip(rows.array, buffers, strict=False):
            row[: rows.page_bytes] = np.frombuffer(buffer, dtype=np.uint8)[: rows.page_bytes]
        self.writing.convert(len(buffers))
        return self.writing.target.views(len(buffers))

    def space(self, n_pages: int) -> list[memoryview]:
        """Where pages to decode are to be."""
        return self.reading.source.views(n_pages)

    def decode(self, buffers: Sequence[memoryview]) -> None:
        """The leading pages in `space`, into `buffers`."""
        self.reading.convert(len(buffers))
        rows = self.reading.target
        for row, buffer in zip(rows.array, buffers, strict=False):
            np.frombuffer(buffer, dtype=np.uint8)[: rows.page_bytes] = row[: rows.page_bytes]


class EncodedDisk:
    """`disk`, whose pages have the layout `stored`, for callers whose slots have the layout `host`.

    Every method is thread-safe; one thread at a time writes, and one reads. n_threads: how many
    convert each way.
    """

    def __init__(
        self, disk: LocalPages, host: PageLayout, stored: PageLayout, n_threads: int = 1
    ) -> None:
        self._disk = disk
        self._converter = _Converter(host, stored, n_threads)

    def __len__(self) -> int:
        """Pages stored."""
        return len(self._disk)

    def contains(self, page_hash: bytes) -> bool:
        """See `DiskNamespace.contains`, as for the methods below."""
        return self._disk.contains(page_hash)

    def count_prefix(self, hashes: Sequence[bytes]) -> int:
        return self._disk.count_prefix(hashes)

    def touch(self, hashes: Iterable[bytes]) -> None:
        self._disk.touch(hashes)

    def drop_pages(self, hashes: Sequence[bytes]) -> int:
        return self._disk.drop_pages(hashes)

    def drain_dropped(self) -> list[bytes] | None:
        return self._disk.drain_dropped()

    def write_pages(self, hashes: Sequence[bytes], buffers: Sequence[memoryview]) -> int:
        """Converts and stores the pages that are not stored yet."""
        new = [i for i, page_hash in enumerate(hashes) if not self._disk.contains(page_hash)]
        n_stored, step = 0, self._converter.n_pages
        with self._converter.writing.lock:
            for at in range(0, len(new), step):
                block = new[at : at + step]
                views = self._converter.encode([buffers[i] for i in block])
                n_stored += self._disk.write_pages([hashes[i] for i in block], views)
        return n_stored

    def read_pages(self, hashes: Sequence[bytes], buffers: Sequence[memoryview]) -> int:
        """Reads and converts the leading pages that are there; returns how many."""
        return _decoded(self._converter, self._disk.read_pages, hashes, buffers)


class EncodedStore:
    """A store that must be asked what it has, the same way (a `PageStore`)."""

    def __init__(
        self, store: PageStore, host: PageLayout, stored: PageLayout, n_threads: int = 1
    ) -> None:
        self.traits: StoreTraits = store.traits
        self._store = store
        self._converter = _Converter(host, stored, n_threads)
        self.known = store.known
        self.lookup = store.lookup
        self.touch = store.touch
        self.drop = store.drop
        self.drain_dropped = store.drain_dropped

    def put(self, hashes: Sequence[PageHash], buffers: Sequence[memoryview]) -> int:
        """Converts what is missing, from the first page that is."""
        n_stored, step = self._store.lookup(hashes), self._converter.n_pages
        with self._converter.writing.lock:
            for at in range(n_stored, len(hashes), step):
                block = slice(at, min(at + step, len(hashes)))
                n_in_block = self._store.put(hashes[block], self._converter.encode(buffers[block]))
                n_stored += n_in_block
                if n_in_block < block.stop - block.start:
                    break
        return n_stored

    def get(self, hashes: Sequence[PageHash], buffers: Sequence[memoryview]) -> int:
        return _decoded(self._converter, self._store.get, hashes, buffers)


def _decoded(
    converter: _Converter,
    read: Callable[[Sequence[bytes], Sequence[memoryview]], int],
    hashes: Sequence[bytes],
    buffers: Sequence[memoryview],
) -> int:
    """Reads and converts the leading pages that are there; returns how many."""
    n_read = 0
    with converter.reading.lock:
        for at in range(0, len(hashes), converter.n_pages):
            block = hashes[at : at + converter.n_pages]
            n_in_block = read(block, converter.space(len(block)))
            if n_in_block:
                converter.decode(buffers[at : at + n_in_block])
            n_read += n_in_block
            if n_in_block < len(block):
                break
    return n_read
