"""The device tier where the host keeps pages in another format: copies that convert on the way.

Encoded as they leave the device, decoded as they arrive, layer by layer (`tiers.device` says what
a copier promises). The conversions are `sgl_kernel_ext`'s ops.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from sgl_kernel_ext.formats import PageLayout
from sgl_kernel_ext.ops import PagePool, gather_pages, scatter_pages
from tiered_kv.tiers.codec import use_one_thread
from tiered_kv.tiers.device import (
    After,
    LayerDone,
    TorchPageCopier,
    page_ids,
)
from tiered_kv.tiers.page_format import PageFormat
from tiered_kv.tiers.slots import PageIds


class EncodedCpuPageCopier:
    """For a device pool that lies in main memory.

    Encodes into and decodes out of the host pool's own rows, on the transfer thread alone: torch
    releases the GIL in each op, and is told to keep off the forward pass's cores.
    """

    #: Most bytes of pages that are gathered beside the host pool, where they lie scattered in it.
    STAGING_BYTES = 16 << 20
    timed = False

    def __init__(
        self, buffers: Sequence[torch.Tensor], layout: PageLayout, host: npt.NDArray[np.uint8]
    ) -> None:
        self.page_format = PageFormat.of_layout(layout)
        self._pool = PagePool(buffers, layout)
        self._host = torch.from_numpy(host)
        self._layer_bytes = [layout.layer_bytes(range(i, i + 1)) for i in range(layout.n_layers)]
        self._chunk_pages = max(1, self.STAGING_BYTES // layout.page_bytes)

    def to_host(self, device_slots: torch.Tensor, host_pages: PageIds, after: After) -> None:
        del after  # a forward pass on the CPU has returned before anyone asks for its pages
        use_one_thread()
        pages = torch.from_numpy(page_ids(device_slots, self.page_format.page_size))
        for chunk in self._chunks(host_pages):
            whole, rows = self._rows(host_pages[chunk])
            gather_pages(self._pool, pages[chunk], whole, rows=rows)

    def to_device(
        self,
        host_pages: PageIds,
        device_slots: torch.Tensor,
        after: After,
        layer_done: LayerDone,
    ) -> None:
        del after
        use_one_thread()
        pages = torch.from_numpy(page_ids(device_slots, self.page_format.page_size))
        parts = [
            (pages[chunk], *self._rows(host_pages[chunk])) for chunk in self._chunks(host_pages)
        ]
        for layer, (start, end) in enumerate(self._layer_bytes):
            for part, whole, rows in parts:
                source = whole[:, start:end]
                scatter_pages(self._pool, part, source, rows=rows, layers=range(layer, layer + 1))
            layer_done(layer, None)

    def _chunks(self, host_pages: PageIds) -> list[slice]:
        """Stretches to convert at a time: everything if it lies together, else what is staged."""
        n = len(host_pages)
        step = n if n and _is_run(host_pages) else self._chunk_pages
        return [slice(at, min(at + step, n)) for at in range(0, n, step)]

    def _rows(self, host_pages: PageIds) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(rows of bytes, which of them): neighbouring pages are rows by themselves."""
        if _is_run(host_pages):
            first = int(host_pages[0])
            return self._host[first : first + len(host_pages)], None
        return self._host, torch.from_numpy(host_pages)


class EncodedTorchPageCopier(TorchPageCopier):
    """For a device pool on an accelerator: encodes into a staging block on the device.

    So only the encoded bytes cross the bus, in one block copy per run of neighbouring host pages.
    """

    def __init__(
        self,
        buffers: Sequence[torch.Tensor],
        layout: PageLayout,
        host: npt.NDArray[np.uint8],
        stream: torch.cuda.Stream | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        """backend: see `sgl_kernel_ext.ops.PagePool`."""
        super().__init__(
            layout.page_size, [b.spec.layer for b in layout.buffers], buffers, host, stream
        )
        self._use_format(PageFormat.of_layout(layout))
        self._pool = PagePool(buffers, layout, backend=backend)

    def _gather(self, device_pages: torch.Tensor, staging: torch.Tensor) -> None:
        gather_pages(self._pool, device_pages, staging)

    def _scatter(self, layer: int, staging: torch.Tensor, device_pages: torch.Tensor) -> None:
        scatter_pages(self._pool, device_pages, staging, layers=range(layer, layer + 1))


def _is_run(pages: PageIds) -> bool:
    """Whether the pages are neighbours in ascending order; there must be one."""
    return int(pages[-1]) - int(pages[0]) == len(pages) - 1 and bool((np.diff(pages) == 1).all())
