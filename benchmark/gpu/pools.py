"""KV pools of one shape on the device and the host: ours and upstream's, for the copies of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from benchmark.gpu.setting import NotHereError, Setting


def scattered_slots(
    n_tokens: int, n_pool: int, page_tokens: int, device: torch.device
) -> torch.Tensor:
    """Slots of whole pages all over a pool, as they lie after a while of serving; int64."""
    generator = torch.Generator().manual_seed(1)
    pages = torch.randperm(n_pool // page_tokens, generator=generator)[: n_tokens // page_tokens]
    slots = pages[:, None] * page_tokens + torch.arange(page_tokens)
    return slots.flatten().to(device)


def upstream_pool(setting: Setting, n_tokens: int) -> Any:
    """The engine's own KV pool of the shape (mem_cache/memory_pool.py)."""
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    shape = setting.shape
    return MHATokenToKVPool(
        size=n_tokens,
        page_size=shape.page_tokens,
        dtype=shape.dtype,
        head_num=shape.n_kv_heads,
        head_dim=shape.head_dim,
        layer_num=shape.n_layers,
        device=str(setting.device),
        enable_memory_saver=False,
    )


class Mover(Protocol):
    """One way to move `n_tokens` between device and host; both calls return when it is done."""

    def to_host(self, n_tokens: int) -> None: ...

    def to_device(self, n_tokens: int) -> None: ...

    def close(self) -> None:
        """Unpins what it pinned: another pool may be mapped at the same address."""


class MemcpyMover:
    """One contiguous copy from and to pinned memory: the most that the link gives."""

    def __init__(self, setting: Setting, n_tokens: int) -> None:
        n_bytes = n_tokens * setting.shape.token_bytes
        self._token_bytes = setting.shape.token_bytes
        self._device = torch.empty(n_bytes, dtype=torch.uint8, device=setting.device)
        self._host = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=setting.on_gpu)
        self._host.zero_()  # the first touch of a page of memory is no copy

    def to_host(self, n_tokens: int) -> None:
        n_bytes = n_tokens * self._token_bytes
        self._host[:n_bytes].copy_(self._device[:n_bytes])

    def to_device(self, n_tokens: int) -> None:
        n_bytes = n_tokens * self._token_bytes
        self._device[:n_bytes].copy_(self._host[:n_bytes])

    def close(self) -> None:
        pass


class OurMover:
    """The tiers' own copier, as `plugin/cache/` makes it for this `--tiered-kv-host-format`."""

    def __init__(self, setting: Setting, n_tokens: int, host_format: str = "raw") -> None:
        from tiered_kv.core.config import HostConfig, TieredKVConfig
        from tiered_kv.plugin.cache.device_copier import make_copier
        from tiered_kv.plugin.cache.device_pool import buffers_of
        from tiered_kv.plugin.cache.formats import tier_formats
        from tiered_kv.tiers.pinned_memory import register_for_dma
        from tiered_kv.tiers.host import HostPool

        self._page = setting.shape.page_tokens
        device = buffers_of(upstream_pool(setting, n_tokens))
        self.buffers = list(device.buffers)
        host_config = HostConfig(page_format=host_format)
        formats = tier_formats(TieredKVConfig(page_size=self._page, host=host_config), device)
        self._host = HostPool(
            formats.host,
            n_tokens // self._page * formats.host.slot_bytes,
            register_for_dma if setting.on_gpu else None,
        )
        self._is_pinned = setting.on_gpu
        self._host.pages[:] = 0
        self._copier = make_copier(formats, device, self._host)
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


@dataclass(frozen=True)
class UpstreamBackend:
    """One of HiCache's ways: its `--hicache-io-backend` and `--hicache-mem-layout`."""

    io: str
    layout: str

    @property
    def name(self) -> str:
        return f"HiCache {self.io}, {self.layout}"


UPSTREAM = (
    UpstreamBackend("kernel", "page_first"),
    UpstreamBackend("kernel", "layer_first"),
    UpstreamBackend("direct", "page_first_direct"),
    UpstreamBackend("direct", "layer_first"),
)


class UpstreamMover:
    """HiCache's host pool and copies (mem_cache/pool_host/mha.py), one layer after another."""

    def __init__(self, setting: Setting, n_tokens: int, backend: UpstreamBackend) -> None:
        if not setting.on_gpu and backend != UPSTREAM[-1]:
            raise NotHereError("its copies are CUDA kernels")
        from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost

        if not setting.on_gpu:
            from benchmark.serving.hicache_on_cpu import patch_host_pools

            patch_host_pools()
        shape = setting.shape
        self._io, self._n_layers = backend.io, shape.n_layers
        self._pool: Any = upstream_pool(setting, n_tokens)
        # Its host pool is sized in gigabytes, or as a multiple of the device's, which must be > 1.
        self._host: Any = MHATokenToKVPoolHost(
            self._pool, 1.05, 0, shape.page_tokens, backend.layout, setting.on_gpu, "cpu"
        )
        slots = scattered_slots(n_tokens, n_tokens, shape.page_tokens, setting.device)
        self.slots = slots
        # The direct backend walks indices on the CPU.
        where = setting.device if backend.io == "kernel" else torch.device("cpu")
        self._device_indices = slots.to(where)
        self._host_indices = torch.arange(n_tokens, dtype=torch.int64, device=where)

    @property
    def buffers(self) -> list[torch.Tensor]:
        pairs = zip(self._pool.k_buffer, self._pool.v_buffer, strict=True)
        return [buffer for pair in pairs for buffer in pair]

    def to_host(self, n_tokens: int) -> None:
        host, device = self._host_indices[:n_tokens], self._device_indices[:n_tokens]
        self._host.backup_from_device_all_layer(self._pool, host, device, self._io)
        self._wait()

    def to_device(self, n_tokens: int) -> None:
        host, device = self._host_indices[:n_tokens], self._device_indices[:n_tokens]
        for layer in range(self._n_layers):
            self._host.load_to_device_per_layer(self._pool, host, device, layer, self._io)
        self._wait()

    def close(self) -> None:
        self._host.destroy()

    def _wait(self) -> None:
        """For this thread's stream only: others go on."""
        if self._pool.k_buffer[0].is_cuda:
            torch.cuda.current_stream().synchronize()
