"""The engine's KV pool and allocator, as the tiers need to see them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

from tiered_kv.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class DeviceBuffers:
    """Token-major buffers (slots, heads, head_dim) in the order of a page.

    layers: the layer that each one serves. is_key: whether it holds keys (or MLA's latents, whose
    channels are alike over tokens as those of keys are) rather than values.
    """

    layers: tuple[int, ...]
    buffers: tuple[torch.Tensor, ...]
    is_key: tuple[bool, ...]

    @property
    def n_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)


def kv_pool_of(pool: Any) -> Any:
    """The pool that has the rows of KV: of a hybrid model that of its layers with attention."""
    return getattr(pool, "full_kv_pool", pool)


def buffers_of(pool: Any) -> DeviceBuffers:
    """The buffers of an MHA/GQA or MLA pool, layer by layer (mem_cache/memory_pool.py).

    Raises ConfigError for a pool whose slots are not rows that can be copied byte by byte.
    """
    if isinstance(pool, MHATokenToKVPool):
        if pool.kv_cache_layout != "nhd" or pool.is_quantized_kv_cache:
            raise ConfigError(
                f"--tiered-kv cannot copy a KV cache in the {pool.kv_cache_layout} layout with "
                f"{type(pool.quant_method).__name__}; use the default layout and an unquantised or "
                "fp8 --kv-cache-dtype."
            )
        pairs = list(zip(pool.k_buffer, pool.v_buffer, strict=True))
        return DeviceBuffers(
            tuple(layer for layer in range(len(pairs)) for _ in range(2)),
            tuple(buffer for pair in pairs for buffer in pair),
            (True, False) * len(pairs),
        )
    if isinstance(pool, MLATokenToKVPool):
        n_layers = len(pool.kv_buffer)
        return DeviceBuffers(tuple(range(n_layers)), tuple(pool.kv_buffer), (True,) * n_layers)
    raise ConfigError(
        f"--tiered-kv does not know the KV pool {type(pool).__name__} of this model; start without "
        "--tiered-kv."
    )


def split_layers(
    device: DeviceBuffers, apart: Collection[int]
) -> tuple[DeviceBuffers, DeviceBuffers]:
    """(The buffers of the other layers, those of the layers `apart`), each counted from 0."""
    parts = []
    for is_apart in (False, True):
        kept = [(layer in apart) is is_apart for layer in device.layers]
        places = {layer: n for n, layer in enumerate(dict.fromkeys(compress(device.layers, kept)))}
        parts.append(
            DeviceBuffers(
                tuple(places[layer] for layer in compress(device.layers, kept)),
                tuple(compress(device.buffers, kept)),
                tuple(compress(device.is_key, kept)),
            )
        )
    return parts[0], parts[1]


class EngineAllocator:
    """The engine's page allocator behind the tiers' `DeviceAllocator` interface."""

    def __init__(self, allocator: Any) -> None:
        self._allocator = allocator

    def available(self) -> int:
        return int(self._allocator.available_size())

    def alloc(self, n_tokens: int) -> torch.Tensor | None:
        slots: torch.Tensor | None = self._allocator.alloc(n_tokens)
        return slots

    def free(self, slots: torch.Tensor) -> None:
        self._allocator.free_segment(slots, start_pos=0)
