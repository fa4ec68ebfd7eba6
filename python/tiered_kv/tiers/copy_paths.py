"""Which way pages cross the bus: both are measured at the start, and the faster one is taken.

Which that is depends on the bus, the page's size and the scatter. `bus_paths.py` says what they do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from tiered_kv.tiers.device import PageCopier
from tiered_kv.tiers.page_format import PageFormat
from tiered_kv.tiers.slots import PageIds
from tiered_kv.tiers.streams import Point

DMA, KERNEL = "dma", "kernel"

#: The kernel must be faster by this factor: it slows the forward pass down, a copy engine hardly
#: (vLLM found the latter better end to end; blog, January 2026).
KERNEL_ADVANTAGE_MIN = 1.1
#: What a measurement copies, and how long it may take after the first copy of each path, which
#: compiles kernels.
MEASURED_BYTES = 64 << 20
MEASURED_S = 0.6
ROUNDS_MAX = 5


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
    copier.begin_to_device(host_pages, device_slots, (), _nobody_waits).finish()
    return CopySeconds(there_s - began_s, clock() - there_s)


def _nobody_waits(layer: int, point: Point | None) -> None:
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
