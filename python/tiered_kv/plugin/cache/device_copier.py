"""Which copier moves pages between the engine's pool and the host's."""

from __future__ import annotations

import logging

import torch

from sgl_kernel_ext.formats import Format, Role
from sgl_kernel_ext.ops import layout_of
from tiered_kv.core.errors import ConfigError
from tiered_kv.plugin.cache.device_pool import DeviceBuffers
from tiered_kv.plugin.cache.formats import TierFormats
from tiered_kv.plugin.options.overlap import COPY_OPTION
from tiered_kv.tiers import copy_paths
from tiered_kv.tiers.copy_paths import DMA, KERNEL, CopyChoice, CopySeconds, KernelPageCopier
from tiered_kv.tiers.device import CpuPageCopier, PageCopier, TorchPageCopier
from tiered_kv.tiers.encoded_copier import EncodedCpuPageCopier, EncodedTorchPageCopier
from tiered_kv.tiers.host import HostPool

logger = logging.getLogger(__name__)


def make_copier(
    formats: TierFormats, device: DeviceBuffers, host: HostPool, copy_path: str = "auto"
) -> PageCopier:
    """copy_path: auto, dma or kernel; a pool in main memory knows neither.

    With auto, pages of both pools are overwritten: they must be empty. Raises ConfigError.
    """
    buffers, page_size = device.buffers, formats.device.page_size
    layout = formats.host_layout if formats.host.is_lossy else None
    if buffers[0].device.type == "cpu":
        if copy_path != "auto":
            raise ConfigError(
                f"{COPY_OPTION} {copy_path} is for GPUs, and the KV pool is in main memory; drop "
                f"{COPY_OPTION}."
            )
        if layout is None:
            return CpuPageCopier(page_size, device.layers, buffers, host.pages)
        return EncodedCpuPageCopier(buffers, layout, host.pages)
    stream = torch.cuda.Stream(device=buffers[0].device)
    dma: PageCopier
    if layout is None:
        dma = TorchPageCopier(page_size, device.layers, buffers, host.pages, stream)
    else:
        dma = EncodedTorchPageCopier(buffers, layout, host.pages, stream)
    if copy_path == DMA:
        return dma
    if copy_path == KERNEL:
        return kernel_copier(formats, device, host, stream)
    return choose_copier(dma, formats, device, host, stream)


def kernel_copier(
    formats: TierFormats,
    device: DeviceBuffers,
    host: HostPool,
    stream: torch.cuda.Stream | None,
) -> KernelPageCopier:
    layout = formats.host_layout
    if layout is None:
        roles = [Role.KEY if is_key else Role.VALUE for is_key in device.is_key]
        page_size = formats.device.page_size
        layout = layout_of(Format.RAW, page_size, device.buffers, device.layers, roles)
    return KernelPageCopier(device.buffers, layout, host.pages, stream)


def choose_copier(
    dma: PageCopier,
    formats: TierFormats,
    device: DeviceBuffers,
    host: HostPool,
    stream: torch.cuda.Stream | None,
) -> PageCopier:
    """The faster one of both for each direction, by measurement; DMA if kernels don't run here."""
    page_size = formats.device.page_size
    n_device_pages = min(b.shape[0] for b in device.buffers) // page_size
    pages, host_pages = copy_paths.measured_pages(formats.host, n_device_pages, host.n_pages)
    slots = torch.from_numpy(pages).to(device.buffers[0].device)[:, None] * page_size
    slots = (slots + torch.arange(page_size, device=slots.device)).flatten()
    try:
        copiers = {DMA: dma, KERNEL: kernel_copier(formats, device, host, stream)}
        if stream is not None:
            # The pools and the indices were filled in another stream.
            torch.cuda.synchronize(slots.device)
        measured = copy_paths.measure(copiers, slots, host_pages)
    except Exception as error:
        # Whatever a compiler or a driver can raise: the other path needs neither.
        logger.warning("Tiered KV: pages are copied by DMA; kernels cannot (%s).", error)
        return dma
    choice = copy_paths.choose(measured)
    log_choice(choice, measured, len(pages) * formats.host.page_bytes)
    return copy_paths.combine(choice, copiers)


def log_choice(choice: CopyChoice, measured: dict[str, CopySeconds], n_bytes: int) -> None:
    dma, kernel = measured[DMA], measured[KERNEL]
    logger.info(
        "Tiered KV: pages go to the host by %s (DMA %.1f GB/s, kernel %.1f) and to the device by "
        "%s (DMA %.1f, kernel %.1f).",
        choice.to_host,
        n_bytes / dma.to_host / 1e9,
        n_bytes / kernel.to_host / 1e9,
        choice.to_device,
        n_bytes / dma.to_device / 1e9,
        n_bytes / kernel.to_device / 1e9,
    )
