"""What the bytes of one KV page are: every layer's K and V for `page_size` tokens, back to back.

The order is layer-major (layer 0 K, layer 0 V, layer 1 K, ...), so that one layer of a page is one
contiguous slice: a load can hand layer i to the forward pass while layer i + 1 is still copied.
The same bytes lie in a host slot and in a disk record: no conversion between tiers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

#: Raise when the byte order inside a page changes: it is part of the namespace, so old records
#: become misses instead of garbage.
LAYOUT_VERSION = 1

#: Host slots and disk payloads start on this boundary, as O_DIRECT wants it.
ALIGNMENT_BYTES = 4096


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


@dataclass(frozen=True, slots=True)
class Segment:
    """One buffer's share of a page: `n_bytes` at `offset` (both bytes), of layer `layer`."""

    layer: int
    offset: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class PageFormat:
    """The layout of a page; `segments[i]` belongs to the i-th device buffer.

    `token_bytes[i]` is what buffer i holds per token; `layers[i]` the layer it serves. Buffers
    must come layer by layer.
    """

    page_size: int
    segments: tuple[Segment, ...]

    @classmethod
    def of_buffers(
        cls, page_size: int, layers: Sequence[int], token_bytes: Sequence[int]
    ) -> PageFormat:
        segments = []
        offset = 0
        for layer, n_bytes in zip(layers, token_bytes, strict=True):
            segments.append(Segment(layer, offset, n_bytes * page_size))
            offset += n_bytes * page_size
        if [s.layer for s in segments] != sorted(s.layer for s in segments):
            raise ValueError("device buffers must be listed layer by layer")
        return cls(page_size, tuple(segments))

    @property
    def page_bytes(self) -> int:
        last = self.segments[-1]
        return last.offset + last.n_bytes

    @property
    def slot_bytes(self) -> int:
        """The page's stride in the host pool and on disk: page_bytes, rounded up for O_DIRECT."""
        return round_up(self.page_bytes, ALIGNMENT_BYTES)

    @property
    def n_layers(self) -> int:
        return self.segments[-1].layer + 1

    def fingerprint(self) -> bytes:
        """32 bytes that differ whenever the same page's bytes would mean something else."""
        text = f"{LAYOUT_VERSION}|{self.page_size}|" + "|".join(
            f"{s.layer},{s.offset},{s.n_bytes}" for s in self.segments
        )
        return hashlib.sha256(text.encode()).digest()
