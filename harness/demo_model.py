"""The demo model's sizes, from which the tests derive how many tokens fit a tier."""

from __future__ import annotations

LAYERS = 30
HIDDEN = 576
Q_HEADS = 9
KV_HEADS = 3
HEAD_DIM = 64


def kv_bytes(tokens: int, element_bytes: int = 4) -> int:
    """Bytes of K and V of `tokens` tokens; float32 unless told otherwise."""
    return tokens * LAYERS * 2 * KV_HEADS * HEAD_DIM * element_bytes


def host_size(tokens: int) -> str:
    """The value of --tiered-kv-host-size for a host pool of exactly `tokens` float32 tokens.

    Exact for whole pages of 16 tokens or a multiple, whose bytes are a multiple of 4096.
    """
    return f"{kv_bytes(tokens)}B"
