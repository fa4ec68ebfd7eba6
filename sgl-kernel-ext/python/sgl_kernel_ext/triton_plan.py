"""Which kernel copies which buffers, and the constants it is compiled for.

Planning needs no device, so that what a GPU will run can be compiled and inspected without one.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from sgl_kernel_ext.formats import (
    ELEMENT_BYTES,
    BufferSpec,
    Format,
    Role,
    boosted_channels,
    key_per_channel,
    sections_of,
)
from sgl_kernel_ext.triton_pack import copy_raw, encode_fp8, encode_per_channel, encode_per_token
from sgl_kernel_ext.triton_unpack import decode_fp8, decode_int

#: The widest load or store of a GPU thread.
VECTOR_BYTES = 16

#: Words of a tile of a raw copy: four wide loads a thread are in flight.
RAW_TILE_WORDS = 2048

#: Elements of a head that a program converts at a time: 32 float32 a thread.
TILE_ELEMENTS = 4096

ELEMENTS = {"float32": tl.float32, "bfloat16": tl.bfloat16, "float16": tl.float16}
WORDS = {1: tl.uint8, 2: tl.int16, 4: tl.int32}


@dataclass(frozen=True, slots=True)
class Buffers:
    """Device buffers alike but for their address and layer, which one launch can serve.

    spec: of any of them; `layer` is not looked at. strides: in elements, by slot, head and channel.
    align: what divides all their addresses, in bytes.
    """

    format: Format
    page_size: int
    spec: BufferSpec
    strides: tuple[int, int, int]
    align: int


@dataclass(frozen=True)
class Launch:
    """A kernel, its constants, and how many programs a page of one buffer takes.

    Multiplications and additions must not be fused, or codes differ from the reference's.
    """

    kernel: Any
    constants: dict[str, Any]
    programs_per_page: int
    num_warps: int


@functools.lru_cache(maxsize=256)
def plan_launch(buffers: Buffers, *, to_pool: bool, has_rows: bool, data_align: int) -> Launch:
    """The launch for these buffers. `data_align` divides the address of every share, in bytes.

    Raises ValueError if the bytes of lossy pages, or of scattered channels, lie at odd addresses.
    """
    spec = buffers.spec
    page_stride = buffers.page_size * buffers.strides[0]
    item = ELEMENT_BYTES[spec.dtype]
    shared = {
        "HAS_ROWS": has_rows,
        "POOL_ALIGN": math.gcd(VECTOR_BYTES, buffers.align, page_stride * item),
        "DATA_ALIGN": math.gcd(VECTOR_BYTES, data_align),
    }
    if buffers.format is Format.RAW:
        return plan_raw(buffers, shared, to_pool=to_pool)
    if shared["DATA_ALIGN"] < VECTOR_BYTES:
        raise ValueError(
            f"{buffers.format} pages must start at multiples of {VECTOR_BYTES} bytes; "
            "align the rows"
        )
    block_channels = max(8, triton.next_power_of_2(spec.head_dim))
    block_tokens = min(
        triton.next_power_of_2(buffers.page_size), max(1, TILE_ELEMENTS // block_channels)
    )
    constants = shared | {
        "ELEMENT": ELEMENTS[spec.dtype],
        "PAGE_STRIDE": page_stride,
        "TOKENS": buffers.page_size,
        "HEADS": spec.n_heads,
        "CHANNELS": spec.head_dim,
        "TOKEN_STRIDE": buffers.strides[0],
        "HEAD_STRIDE": buffers.strides[1],
        "CHANNEL_STRIDE": buffers.strides[2],
        "BLOCK_TOKENS": block_tokens,
        "BLOCK_CHANNELS": block_channels,
    }
    kernel, own = choose_kernel(buffers, to_pool=to_pool)
    tiles = -(-buffers.page_size // block_tokens) if to_pool else 1
    n_warps = min(4, max(1, block_tokens * block_channels // 512))
    return Launch(kernel, constants | own, spec.n_heads * tiles, n_warps)


def choose_kernel(buffers: Buffers, *, to_pool: bool) -> tuple[Any, dict[str, Any]]:
    """A lossy format's kernel, with the constants that only it has."""
    spec = buffers.spec
    at = {s.name: s.offset for s in sections_of(buffers.format, buffers.page_size, spec)}
    if buffers.format is Format.FP8:
        return decode_fp8 if to_pool else encode_fp8, {"SCALE_AT": at["scale"]}
    own: dict[str, Any] = {
        "SCALE_AT": at["scale"],
        "ZERO_AT": at["zero"],
        "BITS": buffers.format.code_bits,
    }
    per_channel = spec.role is Role.KEY and key_per_channel(buffers.page_size)
    boosted = boosted_channels(spec.head_dim) if "boosted" in at else 0
    kitty = {
        "MASK_AT": at.get("boosted", 0),
        "LOW_BITS_AT": at.get("low_bits", 0),
        "BOOSTED": boosted,
    }
    if to_pool:
        return decode_int, own | kitty | {"PER_CHANNEL": per_channel}
    if per_channel:
        block_boosted = max(4, triton.next_power_of_2(max(1, boosted)))
        return encode_per_channel, own | kitty | {"BLOCK_BOOSTED": block_boosted}
    return encode_per_token, own


def plan_raw(buffers: Buffers, shared: dict[str, Any], *, to_pool: bool) -> Launch:
    """Runs of neighbouring elements, as long and as wide-worded as strides and addresses allow."""
    spec = buffers.spec
    tokens, heads, length = buffers.page_size, spec.n_heads, spec.head_dim
    token_stride, head_stride, inner_stride = buffers.strides
    item = ELEMENT_BYTES[spec.dtype]
    if length == 1 or inner_stride == 1:
        inner_stride = 1
        if heads == 1 or head_stride == length:
            heads, length = 1, heads * length
            if tokens == 1 or token_stride == length:
                tokens, length = 1, tokens * length
    word = math.gcd(4, shared["POOL_ALIGN"], shared["DATA_ALIGN"])
    if inner_stride == 1:
        strides = [length] + [head_stride] * (heads > 1) + [token_stride] * (tokens > 1)
        word = math.gcd(word, *(stride * item for stride in strides))
    elif word % item == 0:
        word = item
    else:
        raise ValueError(
            f"pages of {spec.dtype} whose channels are apart must start at multiples of {item} "
            "bytes; align the rows"
        )
    length = length * item // word
    block_length = min(triton.next_power_of_2(length), RAW_TILE_WORDS)
    block_runs = min(triton.next_power_of_2(tokens * heads), RAW_TILE_WORDS // block_length)
    tiles = -(-length // block_length) * -(-(tokens * heads) // block_runs)
    constants = shared | {
        "WORD": WORDS[word],
        "TO_POOL": to_pool,
        "PAGE_STRIDE": buffers.page_size * buffers.strides[0] * item // word,
        "TOKENS": tokens,
        "HEADS": heads,
        "LENGTH": length,
        "TOKEN_STRIDE": token_stride * item // word,
        "HEAD_STRIDE": head_stride * item // word,
        "INNER_STRIDE": inner_stride,
        "BLOCK_RUNS": block_runs,
        "BLOCK_LENGTH": block_length,
    }
    n_warps = min(4, max(1, block_runs * block_length // 128))
    return Launch(copy_raw, constants, tiles, n_warps)
