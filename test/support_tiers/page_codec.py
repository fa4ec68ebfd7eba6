"""Pages in a lossy format, by `sgl_kernel_ext`'s reference: what a host slot or a record must hold.

Also pages that no format changes. Writing one down loses nothing, so every exact check of a tier
holds for them, whatever the tiers keep pages in.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
import torch

from sgl_kernel_ext import reference
from sgl_kernel_ext.formats import BufferSpec, Format, PageLayout, Role

#: After this often a page that is written and read again no longer changes.
ROUNDS_MAX = 50


@lru_cache(maxsize=64)
def page_layout(
    name: str, page_size: int, n_layers: int, n_heads: int = 2, head_dim: int = 4
) -> PageLayout:
    """The layout of pages of a bfloat16 pool with K and V."""
    specs = [
        BufferSpec(layer, role, n_heads, head_dim, "bfloat16")
        for layer in range(n_layers)
        for role in (Role.KEY, Role.VALUE)
    ]
    return PageLayout.of(Format(name), page_size, specs)


class PageCodec:
    """Between the device's bytes of a page, (buffers, tokens, heads, channels), and a layout's."""

    def __init__(self, layout: PageLayout) -> None:
        self.layout = layout

    def encode(self, page: bytes) -> bytes:
        out = torch.zeros(1, self.layout.page_bytes, dtype=torch.uint8)
        reference.gather(self._buffers(page), self.layout, [0], out)
        return out.numpy().tobytes()

    def decode(self, encoded: bytes) -> bytes:
        buffers = self._buffers(None)
        row = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)[None]
        reference.scatter(buffers, self.layout, [0], row)
        return b"".join(buffer.view(torch.uint8).numpy().tobytes() for buffer in buffers)

    def _buffers(self, page: bytes | None) -> list[torch.Tensor]:
        buffers, at = [], 0
        for share in self.layout.buffers:
            spec = share.spec
            shape = (self.layout.page_size, spec.n_heads, spec.head_dim)
            buffer = torch.zeros(shape, dtype=getattr(torch, spec.dtype))
            if page is not None:
                part = bytearray(page[at : at + buffer.nbytes])
                buffer = torch.frombuffer(part, dtype=buffer.dtype).reshape(shape)
                at += buffer.nbytes
            buffers.append(buffer)
        return buffers

    def lasting_page(self, seed: bytes) -> bytes:
        """A page of `seed`'s own that encoding and decoding leave as it is."""
        n_elements = sum(b[0].numel() * self.layout.page_size for b in self._buffers(None))
        rng = np.random.default_rng(int.from_bytes(hashlib.sha256(seed).digest()[:8], "big"))
        values = torch.from_numpy(rng.standard_normal(n_elements, dtype=np.float32)).bfloat16()
        page = values.view(torch.uint8).numpy().tobytes()
        for _ in range(ROUNDS_MAX):
            again = self.decode(self.encode(page))
            if again == page:
                return page
            page = again
        raise AssertionError(f"{self.layout.format} never settles on {seed.hex()}")


@lru_cache(maxsize=64)
def codec(name: str, page_size: int, n_layers: int) -> PageCodec:
    """The codec of `page_layout`'s pages."""
    return PageCodec(page_layout(name, page_size, n_layers))


@lru_cache(maxsize=1 << 16)
def lasting_page(name: str, page_size: int, n_layers: int, seed: bytes) -> bytes:
    """See `PageCodec.lasting_page`; remembered."""
    return codec(name, page_size, n_layers).lasting_page(seed)
