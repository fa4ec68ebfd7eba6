"""Memory that O_DIRECT accepts, kept and reused: the first touch of fresh memory is slow."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
from collections.abc import Iterator

from tiered_kv.tiers.disk.record import BLOCK_BYTES

MAX_PAGES_PER_IO = 128
"""Keeps an I/O below IOV_MAX (1024 buffers) with three buffers per page."""


class AlignedBuffer:
    """Anonymous memory, aligned to the machine's page size (at least 4096)."""

    def __init__(self, n_bytes: int) -> None:
        self._map = mmap.mmap(-1, n_bytes)
        self.view = memoryview(self._map)


class Scratch:
    """What one I/O needs beside the caller's buffers: header blocks, tail blocks, a bounce area."""

    def __init__(self) -> None:
        self._blocks = AlignedBuffer(2 * MAX_PAGES_PER_IO * BLOCK_BYTES)
        self._bounce: AlignedBuffer | None = None

    def header(self, position: int) -> memoryview:
        start = position * BLOCK_BYTES
        return self._blocks.view[start : start + BLOCK_BYTES]

    def tail(self, position: int) -> memoryview:
        """A block for the end of a page that does not fill its last block."""
        return self.header(MAX_PAGES_PER_IO + position)

    def bounce(self, n_bytes: int) -> memoryview:
        """Aligned memory to copy through, at least `n_bytes` long."""
        if self._bounce is None or len(self._bounce.view) < n_bytes:
            self._bounce = AlignedBuffer(n_bytes)
        return self._bounce.view[:n_bytes]


class ScratchPool:
    """Hands out Scratch objects; keeps those that come back."""

    def __init__(self) -> None:
        self._free: list[Scratch] = []
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def borrow(self) -> Iterator[Scratch]:
        with self._lock:
            scratch = self._free.pop() if self._free else None
        scratch = scratch or Scratch()
        try:
            yield scratch
        finally:
            with self._lock:
                self._free.append(scratch)


def as_bytes(buffer: memoryview) -> memoryview:
    """The same memory as a flat view of bytes; raises TypeError if it is not contiguous."""
    if buffer.format == "B" and buffer.ndim == 1:
        return buffer
    return buffer.cast("B")


def is_aligned(buffer: memoryview) -> bool:
    """True if O_DIRECT may use this memory as it is (read-only memory counts as not aligned)."""
    if buffer.readonly:
        return False
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % BLOCK_BYTES == 0
