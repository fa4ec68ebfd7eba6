"""What the bytes of one KV page are: every layer's K and V for `page_size` tokens, back to back.

The order is layer-major (layer 0 K, layer 0 V, layer 1 K, ...), so that one layer of a page is one
contiguous slice: a load can hand layer i to the forward pass while layer i + 1 is still copied.
The same bytes lie in a host slot and in a disk record, unless the tiers are given formats of their
own (`--tiered-kv-host-format`, `--tiered-kv-disk-format`): `sgl_kernel_ext.formats` says how such a
page is laid out, and `tiers.codec` converts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from sgl_kernel_ext.formats import PageLayout
from tiered_kv.tiers.alignment import round_up

#: Raise when the byte order inside a page changes: it is part of the namespace, so old records
#: become misses instead of garbage.
LAYOUT_VERSION = 1


@dataclass(frozen=True, slots=True)
class BufferPart:
    """One buffer's share of a page: `n_bytes` at `offset` (both bytes), of layer `layer`."""

    layer: int
    offset: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class PageFormat:
    """The layout of a page; `parts[i]` belongs to the i-th device buffer.

    `token_bytes[i]` is what buffer i holds per token; `layers[i]` the layer it serves. Buffers
    must come layer by layer.
    encoding: the layout's fingerprint if the bytes are not the device's own, or empty.
    """

    page_size: int
    parts: tuple[BufferPart, ...]
    encoding: bytes = b""

    @classmethod
    def of_buffers(
        cls, page_size: int, layers: Sequence[int], token_bytes: Sequence[int]
    ) -> PageFormat:
        parts = []
        offset = 0
        for layer, n_bytes in zip(layers, token_bytes, strict=True):
            parts.append(BufferPart(layer, offset, n_bytes * page_size))
            offset += n_bytes * page_size
        if [s.layer for s in parts] != sorted(s.layer for s in parts):
            raise ValueError("device buffers must be listed layer by layer")
        return cls(page_size, tuple(parts))

    @classmethod
    def of_layout(cls, layout: PageLayout) -> PageFormat:
        """The page format of a layout; a raw one is the same as that of its buffers."""
        parts = tuple(BufferPart(b.spec.layer, b.offset, b.n_bytes) for b in layout.buffers)
        encoding = layout.fingerprint() if layout.format.is_lossy else b""
        return cls(layout.page_size, parts, encoding)

    @property
    def is_lossy(self) -> bool:
        """Whether a page that was written and read again may differ from what it was."""
        return bool(self.encoding)

    @property
    def page_bytes(self) -> int:
        last = self.parts[-1]
        return last.offset + last.n_bytes

    @property
    def token_bytes(self) -> float:
        """Bytes per token, the padding of the format included."""
        return self.page_bytes / self.page_size

    @property
    def slot_bytes(self) -> int:
        """The page's stride in the host pool and on disk: page_bytes, rounded up for O_DIRECT."""
        return round_up(self.page_bytes)

    def layer_bytes(self, layer: int) -> tuple[int, int]:
        """(start, end) of the bytes of one layer."""
        inside = [s for s in self.parts if s.layer == layer]
        return inside[0].offset, inside[-1].offset + inside[-1].n_bytes

    @property
    def n_layers(self) -> int:
        return self.parts[-1].layer + 1

    def fingerprint(self) -> bytes:
        """32 bytes that differ whenever the same page's bytes would mean something else."""
        text = f"{LAYOUT_VERSION}|{self.page_size}|" + "|".join(
            f"{s.layer},{s.offset},{s.n_bytes}" for s in self.parts
        )
        if self.encoding:
            text += f"|{self.encoding.hex()}"
        return hashlib.sha256(text.encode()).digest()
