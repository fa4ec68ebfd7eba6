"""Copiers for an accelerator, on pools in main memory and streams that do everything at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from sgl_kernel_ext.formats import Format, PageLayout, Role
from sgl_kernel_ext.ops import PagePool, layout_of
from support_tiers.stream_double import Device, Eager
from tiered_kv.tiers.bus_paths import BLOCK_BYTES, DmaPath, KernelPath
from tiered_kv.tiers.copy_paths import KERNEL
from tiered_kv.tiers.stream_copier import StreamPageCopier


def encoding_copier(
    path: str,
    buffers: Sequence[torch.Tensor],
    layout: PageLayout,
    host: npt.NDArray[np.uint8],
    *,
    block_bytes: int = BLOCK_BYTES,
    backend: str = "auto",
) -> StreamPageCopier:
    pool = PagePool(buffers, layout, backend=backend)
    streams = Device(Eager()).copy_streams
    if path == KERNEL:
        kernel = KernelPath(pool, host)
        return StreamPageCopier(kernel, kernel, streams)
    down, up = (DmaPath(pool, host, block_bytes=block_bytes) for _ in range(2))
    return StreamPageCopier(down, up, streams)


def stream_copier(
    path: str,
    page_size: int,
    layers: Sequence[int],
    buffers: Sequence[torch.Tensor],
    host: npt.NDArray[np.uint8],
    *,
    block_bytes: int = BLOCK_BYTES,
) -> StreamPageCopier:
    """Of pages as the device has them; buffers: (slots, heads, head_dim) each."""
    roles = [Role.KEY] * len(buffers)
    rows = [b if b.ndim == 3 else b.unsqueeze(1) for b in buffers]
    layout = layout_of(Format.RAW, page_size, rows, layers, roles)
    return encoding_copier(path, rows, layout, host, block_bytes=block_bytes)
