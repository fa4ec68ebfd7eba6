"""Two ways for pages to cross the bus between a GPU and pinned host memory.

dma     A copy engine moves them, through a block on the device: one kernel gathers all layers of
        the pages into it, or scatters a layer out of it. Takes no compute units while it moves.
kernel  A kernel reads or writes the host pool's rows itself: no block, and no call per run of
        pages, which is what Strata (arXiv 2508.18572) gains from where pages lie scattered; but it
        shares the compute units with the forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from sgl_kernel_ext.formats import PageLayout
from sgl_kernel_ext.ops import PagePool, gather_pages, scatter_pages
from tiered_kv.tiers.device import contiguous_runs
from tiered_kv.tiers.slots import PageIds
from tiered_kv.tiers.streams import Stream

#: A block takes at least so many bytes, for copies long enough to fill the bus.
BLOCK_BYTES = 32 << 20
#: Calls of a load that copy, about: beyond, layers come several at a time. The thread that launches
#: forward passes makes them, and a stream takes about a thousand calls before it makes one wait.
CALLS_MAX = 256


class DmaPath:
    """Gathers and scatters on the device, and lets a copy engine move whole rows.

    The block is used again by the next piece in the same stream, which keeps their order: each
    direction needs a path of its own. It is all the device memory that copies take, however much
    is copied.
    """

    def __init__(
        self, pool: PagePool, host: npt.NDArray[np.uint8], *, block_bytes: int = BLOCK_BYTES
    ) -> None:
        self.layout: PageLayout = pool.layout
        self._pool = pool
        self._host = torch.from_numpy(host)
        n_bytes = max(block_bytes, self.layout.page_bytes)
        # Threads write to it that are not in inference mode.
        with torch.inference_mode(False):
            self._block = torch.empty(n_bytes, dtype=torch.uint8, device=pool.device)

    @property
    def block_bytes(self) -> int:
        return len(self._block)

    def to_host(self, stream: Stream, pages: torch.Tensor, host_pages: PageIds) -> None:
        page_bytes = self.layout.page_bytes
        for chunk, block in self._chunks(len(host_pages), page_bytes):
            stream.run(partial(gather_pages, self._pool, pages[chunk], block))
            for row, host, n in _rows_of(host_pages[chunk]):
                stream.copy_rows(self._host[host : host + n, :page_bytes], block[row : row + n])

    def to_device(
        self, stream: Stream, pages: torch.Tensor, host_pages: PageIds
    ) -> Iterator[range]:
        for layers in layer_runs(self.layout, len(_rows_of(host_pages))):
            start, end = self.layout.layer_bytes(layers)
            for chunk, block in self._chunks(len(host_pages), end - start):
                for row, host, n in _rows_of(host_pages[chunk]):
                    stream.copy_rows(block[row : row + n], self._host[host : host + n, start:end])
                stream.run(partial(scatter_pages, self._pool, pages[chunk], block, layers=layers))
            yield layers

    def _chunks(self, n_pages: int, n_bytes: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """As many pages at a time as fit into the block, (pages, n_bytes)."""
        step = len(self._block) // n_bytes
        for at in range(0, n_pages, step):
            n = min(step, n_pages - at)
            yield slice(at, at + n), self._block[: n * n_bytes].view(n, n_bytes)


class KernelPath:
    """Kernels on the device that read and write the host pool's rows, which must be pinned."""

    block_bytes = 0

    def __init__(self, pool: PagePool, host: npt.NDArray[np.uint8]) -> None:
        self.layout: PageLayout = pool.layout
        self._pool = pool
        self._host = torch.from_numpy(host)

    def to_host(self, stream: Stream, pages: torch.Tensor, host_pages: PageIds) -> None:
        rows = stream.upload(host_pages)
        stream.run(partial(gather_pages, self._pool, pages, self._host, rows=rows))

    def to_device(
        self, stream: Stream, pages: torch.Tensor, host_pages: PageIds
    ) -> Iterator[range]:
        rows = stream.upload(host_pages)
        for layer in range(self.layout.n_layers):
            layers = range(layer, layer + 1)
            start, end = self.layout.layer_bytes(layers)
            source = self._host[:, start:end]
            stream.run(partial(scatter_pages, self._pool, pages, source, rows=rows, layers=layers))
            yield layers


def layer_runs(layout: PageLayout, n_runs: int) -> list[range]:
    """Which layers of a load come together, if its pages are `n_runs` runs on the host.

    One by one, unless that takes more than CALLS_MAX calls.
    """
    n_layers = layout.n_layers
    step = -(-n_layers // max(1, CALLS_MAX // max(1, n_runs)))
    return [range(at, min(at + step, n_layers)) for at in range(0, n_layers, step)]


def _rows_of(host_pages: PageIds) -> list[tuple[int, int, int]]:
    """(row, host page, length) of the runs of neighbouring host pages in a block."""
    return list(contiguous_runs(np.arange(len(host_pages), dtype=np.int64), host_pages))
