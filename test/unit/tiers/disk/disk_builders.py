"""Pages and buffers for the tests of the disk tier."""

from __future__ import annotations

import hashlib
import mmap
import random

MIB = 1 << 20
PAGE_BYTES = 64 << 10
NAMESPACE = hashlib.sha256(b"a model").digest()


def page_hash(seed: int) -> bytes:
    return hashlib.sha256(seed.to_bytes(8, "little")).digest()


def page_payload(seed: int, n_bytes: int) -> bytes:
    """Random bytes that depend only on the seed."""
    return random.Random(seed).randbytes(n_bytes)


def aligned(n_bytes: int) -> memoryview:
    """Memory that direct I/O takes as it is."""
    return memoryview(mmap.mmap(-1, n_bytes))


def filled(seed: int, n_bytes: int, length: int | None = None) -> memoryview:
    """An aligned buffer that holds the page of this seed (and is `length` long)."""
    view = aligned(length or n_bytes)
    view[:n_bytes] = page_payload(seed, n_bytes)
    return view
