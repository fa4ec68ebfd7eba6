"""The disk tier where it keeps pages in another format than the host: converts on the way.

A block of pages at a time, beside the threads of the disk's I/O: the host keeps its slots, the disk
sees pages of its own format only. What is wrong on disk is found there, by the checksum over
the stored bytes, and is a miss here as it is without conversion.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from sgl_kernel_ext.formats import Format, PageLayout
from tiered_kv.tiers.codec import PageTranscoder, use_one_thread
from tiered_kv.tiers.cold.local_pages import LocalPages
from tiered_kv.tiers.disk.buffers import AlignedBuffer
from tiered_kv.tiers.page_format import PageFormat

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


class EncodedDisk:
    """`disk`, whose pages have the layout `stored`, for callers whose slots have the layout `host`.

    Every method is thread-safe; one thread at a time writes, and one reads. n_threads: how many
    convert each way.
    """

    def __init__(
        self, disk: LocalPages, host: PageLayout, stored: PageLayout, n_threads: int = 1
    ) -> None:
        device = PageLayout.of(Format.RAW, host.page_size, [b.spec for b in host.buffers])
        self._n_pages = n_threads * max(1, BLOCK_BYTES // device.page_bytes // n_threads)
        self._disk = disk
        self._writing = _Direction(host, stored, self._n_pages, n_threads)
        self._reading = _Direction(stored, host, self._n_pages, n_threads)

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

    def drain_dropped(self) -> list[bytes] | None:
        return self._disk.drain_dropped()

    def write_pages(self, hashes: Sequence[bytes], buffers: Sequence[memoryview]) -> int:
        """Converts and stores the pages that are not stored yet."""
        new = [i for i, page_hash in enumerate(hashes) if not self._disk.contains(page_hash)]
        n_stored = 0
        with self._writing.lock:
            for at in range(0, len(new), self._n_pages):
                block = new[at : at + self._n_pages]
                self._encode([buffers[i] for i in block])
                views = self._writing.target.views(len(block))
                n_stored += self._disk.write_pages([hashes[i] for i in block], views)
        return n_stored

    def _encode(self, buffers: Sequence[memoryview]) -> None:
        rows = self._writing.source
        for row, buffer in zip(rows.array, buffers, strict=False):
            row[: rows.page_bytes] = np.frombuffer(buffer, dtype=np.uint8)[: rows.page_bytes]
        self._writing.convert(len(buffers))

    def read_pages(self, hashes: Sequence[bytes], buffers: Sequence[memoryview]) -> int:
        """Reads and converts the leading pages that are there; returns how many."""
        n_read = 0
        with self._reading.lock:
            for at in range(0, len(hashes), self._n_pages):
                block = hashes[at : at + self._n_pages]
                n_in_block = self._disk.read_pages(block, self._reading.source.views(len(block)))
                self._decode(buffers[at : at + n_in_block])
                n_read += n_in_block
                if n_in_block < len(block):
                    break
        return n_read

    def _decode(self, buffers: Sequence[memoryview]) -> None:
        self._reading.convert(len(buffers))
        rows = self._reading.target
        for row, buffer in zip(rows.array, buffers, strict=False):
            np.frombuffer(buffer, dtype=np.uint8)[: rows.page_bytes] = row[: rows.page_bytes]
