"""KV buffers of one shape on the device, and ways to move their pages to the host and back.

Needs torch, and Triton on a GPU; nothing of SGLang.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

from benchmark.gpu.setting import Setting
from sgl_kernel_ext.formats import Format, Role
from sgl_kernel_ext.ops import PagePool, layout_of
from tiered_kv.tiers.bus_paths import DmaPath, KernelPath
from tiered_kv.tiers.device import CpuPageCopier, PageCopier
from tiered_kv.tiers.host import HostPool
from tiered_kv.tiers.page_format import PageFormat


def scattered_slots(
    n_tokens: int, n_pool: int, page_tokens: int, device: torch.device
) -> torch.Tensor:
    """Slots of whole pages all over a pool, as they lie after a while of serving; int64."""
    generator = torch.Generator().manual_seed(1)
    pages = torch.randperm(n_pool // page_tokens, generator=generator)[: n_tokens // page_tokens]
    slots = pages[:, None] * page_tokens + torch.arange(page_tokens)
    return slots.flatten().to(device)


class Mover(Protocol):
    """One way to move `n_tokens` between device and host; both calls return when it is done."""

    def to_host(self, n_tokens: int) -> None: ...

    def to_device(self, n_tokens: int) -> None: ...

    def close(self) -> None:
        """Unpins what it pinned: another pool may be mapped at the same address."""


class MemcpyMover:
    """One contiguous copy from and to pinned memory: the most that the link gives.

    Two blocks on the device, so that both directions at once are in nobody's way.
    """

    def __init__(self, setting: Setting, n_tokens: int) -> None:
        n_bytes = n_tokens * setting.shape.token_bytes
        self._token_bytes = setting.shape.token_bytes
        self._sides = [
            (
                torch.empty(n_bytes, dtype=torch.uint8, device=setting.device),
                torch.zeros(n_bytes, dtype=torch.uint8, pin_memory=setting.on_gpu),
            )
            for _ in range(2)
        ]

    def to_host(self, n_tokens: int) -> None:
        device, host = self._sides[0]
        n_bytes = n_tokens * self._token_bytes
        host[:n_bytes].copy_(device[:n_bytes])

    def to_device(self, n_tokens: int) -> None:
        device, host = self._sides[1]
        n_bytes = n_tokens * self._token_bytes
        device[:n_bytes].copy_(host[:n_bytes])

    def close(self) -> None:
        pass


class OurMover:
    """The tiers' own copier. path: dma or kernel; on a CPU there is but one."""

    def __init__(
        self, setting: Setting, n_tokens: int, path: str = "dma", host_format: str = "raw"
    ) -> None:
        shape = setting.shape
        self._page = shape.page_tokens
        layers = [layer for layer in range(shape.n_layers) for _ in range(2)]
        size = (n_tokens, shape.n_kv_heads, shape.head_dim)
        self.buffers = [torch.zeros(size, dtype=shape.dtype, device=setting.device) for _ in layers]
        self._is_pinned = setting.on_gpu
        roles = [Role.KEY, Role.VALUE] * shape.n_layers
        layout = layout_of(Format(host_format), self._page, self.buffers, layers, roles)
        page_format = PageFormat.of_layout(layout)
        n_pages = n_tokens // self._page
        register = None
        if setting.on_gpu:
            from tiered_kv.tiers.pinned_memory import register_for_dma

            register = register_for_dma
        self._host = HostPool(page_format, n_pages * page_format.slot_bytes, register)
        self._copier: PageCopier
        if setting.on_gpu:
            from tiered_kv.tiers.cuda_streams import open_streams
            from tiered_kv.tiers.stream_copier import StreamPageCopier

            pool, streams = PagePool(self.buffers, layout), open_streams(self.buffers[0].device)
            if path == "dma":
                down, up = (DmaPath(pool, self._host.pages) for _ in range(2))
                self._copier = StreamPageCopier(down, up, streams)
            else:
                kernel = KernelPath(pool, self._host.pages)
                self._copier = StreamPageCopier(kernel, kernel, streams)
        else:
            self._copier = CpuPageCopier(self._page, layers, self.buffers, self._host.pages)
        self.slots = scattered_slots(n_tokens, n_tokens, self._page, setting.device)

    def to_host(self, n_tokens: int) -> None:
        pages = np.arange(n_tokens // self._page, dtype=np.int64)
        self._copier.to_host(self.slots[:n_tokens], pages, ())

    def to_device(self, n_tokens: int) -> None:
        pages = np.arange(n_tokens // self._page, dtype=np.int64)
        slots = self.slots[:n_tokens]
        self._copier.begin_to_device(pages, slots, (), lambda _layer, _point: None).finish()

    def close(self) -> None:
        if self._is_pinned:
            torch.cuda.cudart().cudaHostUnregister(self._host.pages.ctypes.data)
