"""Which copier moves pages between the engine's pool and the host's."""

from __future__ import annotations

import logging

import torch

from sgl_kernel_ext.formats import Format, PageLayout, Role
from sgl_kernel_ext.ops import PagePool, layout_of, warm_up
from tiered_kv.core.errors import ConfigError
from tiered_kv.plugin.cache.device_pool import DeviceBuffers
from tiered_kv.plugin.cache.formats import TierFormats
from tiered_kv.plugin.options.overlap import COPY_OPTION
from tiered_kv.tiers import copy_paths
from tiered_kv.tiers.bus_paths import DmaPath, KernelPath
from tiered_kv.tiers.copy_paths import DMA, KERNEL, CopyChoice, CopySeconds
from tiered_kv.tiers.cuda_streams import open_streams
from tiered_kv.tiers.device import CpuPageCopier, PageCopier
from tiered_kv.tiers.encoded_copier import EncodedCpuPageCopier
from tiered_kv.tiers.host import HostPool
from tiered_kv.tiers.stream_copier import StreamPageCopier
from tiered_kv.tiers.streams import CopyStreams

logger = logging.getLogger(__name__)


def make_copier(
    formats: TierFormats, device: DeviceBuffers, host: HostPool, copy_path: str = "auto"
) -> PageCopier:
    """copy_path: auto, dma or kernel; a pool in main memory knows neither.

    With auto, pages of both pools are overwritten: they must be empty. Raises ConfigError.
    """
    buffers = device.buffers
    if buffers[0].device.type != "cpu":
        streams = open_streams(buffers[0].device)
        return make_stream_copier(formats, device, host, streams, copy_path)
    if copy_path != "auto":
        raise ConfigError(
            f"{COPY_OPTION} {copy_path} is for GPUs, and the KV pool is in main memory; drop "
            f"{COPY_OPTION}."
        )
    if formats.host.is_lossy and formats.host_layout is not None:
        return EncodedCpuPageCopier(buffers, formats.host_layout, host.pages)
    return CpuPageCopier(formats.device.page_size, device.layers, buffers, host.pages)


def make_stream_copier(
    formats: TierFormats,
    device: DeviceBuffers,
    host: HostPool,
    streams: CopyStreams,
    copy_path: str = "auto",
) -> StreamPageCopier:
    """See `make_copier`. By DMA without kernels of ours where those do not run."""
    layout = host_layout(formats, device)
    try:
        pool = PagePool(device.buffers, layout)
        warm_up(pool)
        copiers = {DMA: dma_copier(pool, host, streams), KERNEL: kernel_copier(pool, host, streams)}
        choice = {DMA: CopyChoice(DMA, DMA), KERNEL: CopyChoice(KERNEL, KERNEL)}.get(copy_path)
        if choice is None:
            choice = choose(copiers, formats, device, host)
    except Exception as error:
        # Whatever a compiler or a driver can raise.
        if copy_path == KERNEL:
            raise ConfigError(
                f"{COPY_OPTION} {KERNEL}: kernels do not run here ({error}); drop {COPY_OPTION}."
            ) from None
        logger.warning("Tiered KV: pages are copied by DMA; kernels cannot (%s).", error)
        return dma_copier(PagePool(device.buffers, layout, backend="torch"), host, streams)
    down, up = copiers[choice.to_host].down, copiers[choice.to_device].up
    logger.info(
        "Tiered KV: copies keep %.0f MiB of device memory beside the KV pool, whatever is copied.",
        (down.block_bytes + up.block_bytes) / (1 << 20),
    )
    return StreamPageCopier(down, up, streams)


def host_layout(formats: TierFormats, device: DeviceBuffers) -> PageLayout:
    """How the host's pages are laid out, raw ones included."""
    if formats.host_layout is not None:
        return formats.host_layout
    roles = [Role.KEY if is_key else Role.VALUE for is_key in device.is_key]
    return layout_of(Format.RAW, formats.device.page_size, device.buffers, device.layers, roles)


def dma_copier(pool: PagePool, host: HostPool, streams: CopyStreams) -> StreamPageCopier:
    return StreamPageCopier(DmaPath(pool, host.pages), DmaPath(pool, host.pages), streams)


def kernel_copier(pool: PagePool, host: HostPool, streams: CopyStreams) -> StreamPageCopier:
    path = KernelPath(pool, host.pages)
    return StreamPageCopier(path, path, streams)


def choose(
    copiers: dict[str, StreamPageCopier],
    formats: TierFormats,
    device: DeviceBuffers,
    host: HostPool,
) -> CopyChoice:
    """The faster one of both for each direction, by measurement."""
    page_size = formats.device.page_size
    n_device_pages = min(b.shape[0] for b in device.buffers) // page_size
    pages, host_pages = copy_paths.measured_pages(formats.host, n_device_pages, host.n_pages)
    slots = torch.from_numpy(pages).to(device.buffers[0].device)[:, None] * page_size
    slots = (slots + torch.arange(page_size, device=slots.device)).flatten()
    if slots.is_cuda:
        # The pools and the indices were filled in another stream.
        torch.cuda.synchronize(slots.device)
    measured = copy_paths.measure(copiers, slots, host_pages)
    choice = copy_paths.choose(measured)
    log_choice(choice, measured, len(pages) * formats.host.page_bytes)
    return choice


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
