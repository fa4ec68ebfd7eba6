"""Two ways for pages to cross the bus between a GPU and host memory, and the choice of one.

dma     `TorchPageCopier`: gathered on the device into a block, which a copy engine moves. Takes no
        compute units while it moves; vLLM found it better end to end (blog, January 2026).
kernel  `KernelPageCopier`: a kernel reads or writes the host pool's rows itself. No staging, no
        call per run of pages, which is what Strata (arXiv 2508.18572) gains from where pages lie
        scattered; but it shares the compute units with the forward pass.

Which is faster depends on the bus, the page's size and the scatter: both are measured at the start.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from sgl_kernel_ext.formats import PageLayout
from sgl_kernel_ext.ops import gather_pages, scatter_pages
from tiered_kv.tiers.device import After, LayerDone, PageCopier, pages_of
from tiered_kv.tiers.encoded_copier import EncodedTorchPageCopier
from tiered_kv.tiers.layer_gate import LayerEvent
from tiered_kv.tiers.page_format import PageFormat
from tiered_kv.tiers.slots import PageIds

DMA, KERNEL = "dma", "kernel"

#: The kernel must be faster by this factor: it slows the forward pass down, a copy engine hardly.
KERNEL_ADVANTAGE_MIN = 1.1
#: What a measurement copies, and how long it may take after the first copy of each path, which
#: compiles kernels.
MEASURED_BYTES = 64 << 20
MEASURED_S = 0.6
ROUNDS_MAX = 5


class KernelPageCopier(EncodedTorchPageCopier):
    """Kernels read and write the host pool's rows, in any format, raw ones included.

    On a GPU the host pool must be pinned. backend: see `sgl_kernel_ext.ops.PagePool`; with
    `stream=None` it works on any device, synchronously.
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
        super().__init__(buffers, layout, host, stream, backend=backend)
        self._layers = [range(i, i + 1) for i in range(layout.n_layers)]
        self._layer_bytes = [layout.layer_bytes(layer) for layer in self._layers]

    def to_host(self, device_slots: torch.Tensor, host_pages: PageIds, after: After) -> None:
        with torch.cuda.stream(self._stream):
            self._wait(after)
            pages, rows = self._indices(device_slots, host_pages)
            gather_pages(self._pool, pages, self._host, rows=rows)
        self._synchronize()

    def to_device(
        self,
        host_pages: PageIds,
        device_slots: torch.Tensor,
        after: After,
        layer_done: LayerDone,
    ) -> None:
        with torch.cuda.stream(self._stream):
            self._wait(after)
            pages, rows = self._indices(device_slots, host_pages)
            for layer, (start, end) in zip(self._layers, self._layer_bytes, strict=True):
                source = self._host[:, start:end]
                scatter_pages(self._pool, pages, source, rows=rows, layers=layer)
                layer_done(layer.start, self._record())
        self._synchronize()

    def _indices(
        self, device_slots: torch.Tensor, host_pages: PageIds
    ) -> tuple[torch.Tensor, torch.Tensor]:
        pages = pages_of(device_slots, self.page_format.page_size)
        return pages, torch.from_numpy(host_pages).to(self._device)


class TwoWayCopier:
    """Copies to the host by one path and to the device by another."""

    def __init__(self, down: PageCopier, up: PageCopier) -> None:
        self.page_format: PageFormat = down.page_format
        self._down = down
        self._up = up

    @property
    def timed(self) -> bool:
        return self._up.timed

    @timed.setter
    def timed(self, timed: bool) -> None:
        self._up.timed = timed

    def to_host(self, device_slots: torch.Tensor, host_pages: PageIds, after: After) -> None:
        self._down.to_host(device_slots, host_pages, after)

    def to_device(
        self,
        host_pages: PageIds,
        device_slots: torch.Tensor,
        after: After,
        layer_done: LayerDone,
    ) -> None:
        self._up.to_device(host_pages, device_slots, after, layer_done)


@dataclass(frozen=True, slots=True)
class CopySeconds:
    """How long the same pages took to the host and to the device, at best."""

    to_host: float
    to_device: float


@dataclass(frozen=True, slots=True)
class CopyChoice:
    """A path for each direction."""

    to_host: str
    to_device: str


def choose(measured: Mapping[str, CopySeconds]) -> CopyChoice:
    """The kernel where it is faster by KERNEL_ADVANTAGE_MIN, else DMA. DMA must be measured."""
    dma, kernel = measured[DMA], measured.get(KERNEL)
    if kernel is None:
        return CopyChoice(DMA, DMA)
    return CopyChoice(
        KERNEL if kernel.to_host * KERNEL_ADVANTAGE_MIN < dma.to_host else DMA,
        KERNEL if kernel.to_device * KERNEL_ADVANTAGE_MIN < dma.to_device else DMA,
    )


def measure(
    copiers: Mapping[str, PageCopier],
    device_slots: torch.Tensor,
    host_pages: PageIds,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, CopySeconds]:
    """Times the same pages on each path, in turns, the best of up to ROUNDS_MAX rounds.

    The pages on the host are overwritten, those on the device keep their bytes (in a raw format).
    """
    best = {path: CopySeconds(np.inf, np.inf) for path in copiers}
    for copier in copiers.values():
        _round_trip(copier, device_slots, host_pages, clock)
    deadline_s = clock() + MEASURED_S
    for _ in range(ROUNDS_MAX):
        for path, copier in copiers.items():
            seconds = _round_trip(copier, device_slots, host_pages, clock)
            best[path] = CopySeconds(
                min(best[path].to_host, seconds.to_host),
                min(best[path].to_device, seconds.to_device),
            )
        if clock() >= deadline_s:
            break
    return best


def _round_trip(
    copier: PageCopier,
    device_slots: torch.Tensor,
    host_pages: PageIds,
    clock: Callable[[], float],
) -> CopySeconds:
    began_s = clock()
    copier.to_host(device_slots, host_pages, ())
    there_s = clock()
    copier.to_device(host_pages, device_slots, (), _nobody_waits)
    return CopySeconds(there_s - began_s, clock() - there_s)


def _nobody_waits(layer: int, event: LayerEvent | None) -> None:
    pass


def measured_pages(
    page_format: PageFormat, n_device_pages: int, n_host_pages: int
) -> tuple[PageIds, PageIds]:
    """(pages of the device, pages of the host) to measure with; the device's page 0 is left alone.

    As a server that has run for a while has them: on the host in runs, on the device scattered.
    """
    n = min(max(1, MEASURED_BYTES // page_format.page_bytes), n_device_pages - 1, n_host_pages)
    scattered = np.random.default_rng(0).permutation(n_device_pages - 1)[:n] + 1
    return scattered.astype(np.int64), np.arange(n, dtype=np.int64)


def combine(choice: CopyChoice, copiers: Mapping[str, PageCopier]) -> PageCopier:
    if choice.to_host == choice.to_device:
        return copiers[choice.to_host]
    return TwoWayCopier(copiers[choice.to_host], copiers[choice.to_device])
