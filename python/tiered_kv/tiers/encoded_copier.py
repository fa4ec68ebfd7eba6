"""The device tier where the host keeps pages in another format: copies that convert on the way.

Encoded as they leave the device, decoded as they arrive, layer by layer (`tiers.device` says what
a copier promises). The conversions are `sgl_kernel_ext`'s ops.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from sgl_kernel_ext.formats import PageLayout
from sgl_kernel_ext.ops import PagePool, gather_pages, scatter_pages
from tiered_kv.tiers.codec import use_one_thread
from tiered_kv.tiers.device import HostCopier
from tiered_kv.tiers.page_format import PageFormat
from tiered_kv.tiers.slots import PageIds

#: (pages of the device, rows of bytes, which of them if not the first ones).
Piece = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


class EncodedCpuPageCopier(HostCopier[Piece]):
    """Encodes into and decodes out of the host pool's own rows, on the transfer thread alone.

    torch releases the GIL in each op, and is told to keep off the forward pass's cores.
    """

    #: Most bytes of pages that are gathered beside the host pool, where they lie scattered in it.
    STAGING_BYTES = 16 << 20

    def __init__(
        self, buffers: Sequence[torch.Tensor], layout: PageLayout, host: npt.NDArray[np.uint8]
    ) -> None:
        self.page_format = PageFormat.of_layout(layout)
        self._pool = PagePool(buffers, layout)
        self._host = torch.from_numpy(host)
        self._chunk_pages = max(1, self.STAGING_BYTES // layout.page_bytes)

    def _pieces(self, device_pages: PageIds, host_pages: PageIds) -> Iterator[Piece]:
        """Everything at once if it lies together on the host, else as much as is staged."""
        use_one_thread()
        n = len(host_pages)
        step = n if n and _is_run(host_pages) else self._chunk_pages
        for at in range(0, n, step):
            chunk = slice(at, min(at + step, n))
            yield torch.from_numpy(device_pages[chunk]), *self._rows(host_pages[chunk])

    def _rows(self, host_pages: PageIds) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(rows of bytes, which of them): neighbouring pages are rows by themselves."""
        if _is_run(host_pages):
            first = int(host_pages[0])
            return self._host[first : first + len(host_pages)], None
        return self._host, torch.from_numpy(host_pages)

    def _to_host(self, piece: Piece) -> None:
        pages, whole, rows = piece
        gather_pages(self._pool, pages, whole, rows=rows)

    def _to_device(self, piece: Piece, layer: int) -> None:
        pages, whole, rows = piece
        layers = range(layer, layer + 1)
        start, end = self._pool.layout.layer_bytes(layers)
        scatter_pages(self._pool, pages, whole[:, start:end], rows=rows, layers=layers)


def _is_run(pages: PageIds) -> bool:
    """Whether the pages are neighbours in ascending order; there must be one."""
    return int(pages[-1]) - int(pages[0]) == len(pages) - 1 and bool((np.diff(pages) == 1).all())
