"""What every step of the check is given: device, sizes, and a folder for what it writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from tiered_kv.core.errors import TieredKVError


class NotHereError(TieredKVError):
    """A step, or a row of its table, can't be measured on this machine; the message says why."""


@dataclass(frozen=True)
class KVShape:
    """The KV cache of one model on one rank."""

    name: str
    n_layers: int
    n_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    page_tokens: int

    @property
    def token_bytes(self) -> int:
        """Of K and V in all layers."""
        return 2 * self.n_layers * self.n_kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def page_bytes(self) -> int:
        return self.page_tokens * self.token_bytes


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


LLAMA_8B = KVShape("Llama-3.1-8B", 32, 8, 128, torch.bfloat16, 64)
SMALL = KVShape("two small layers", 2, 2, 32, torch.bfloat16, 16)


@dataclass(frozen=True)
class Setting:
    """device: "cuda" or "cpu". is_small: sizes for a test, whose figures say nothing."""

    device: torch.device
    is_small: bool
    folder: Path

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def shape(self) -> KVShape:
        return SMALL if self.is_small else LLAMA_8B

    @property
    def repeats(self) -> int:
        return 3 if self.is_small else 9

    @property
    def transfer_tokens(self) -> tuple[int, ...]:
        """How much is moved at a time, in tokens."""
        return (64, 256) if self.is_small else (1024, 4096, 16384)
