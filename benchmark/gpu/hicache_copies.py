"""SGLang's own ways to copy the same pages: HiCache's backends and layouts, beside ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmark.gpu.copies import measure_all
from benchmark.gpu.pools import MemcpyMover, Mover, OurMover, scattered_slots
from benchmark.gpu.record import Record
from benchmark.gpu.setting import NotHereError, Setting


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


def measure(setting: Setting, notes: Record) -> dict[str, Any]:
    """As `copies`, with HiCache's ways."""
    most = max(setting.transfer_tokens)
    return measure_all(
        setting,
        notes,
        [
            ("memcpy", lambda: MemcpyMover(setting, most)),
            ("ours, dma", lambda: OurMover(setting, most)),
            *((backend.name, maker(setting, backend)) for backend in UPSTREAM),
        ],
    )


def maker(setting: Setting, backend: UpstreamBackend) -> Callable[[], Mover]:
    return lambda: UpstreamMover(setting, max(setting.transfer_tokens), backend)


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
