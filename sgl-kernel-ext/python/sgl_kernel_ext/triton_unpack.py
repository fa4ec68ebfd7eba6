"""Kernels that scatter: page-first rows to pages of the pool, in each lossy format.

Arguments as in `triton_pack`, whose `copy_raw` serves both directions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sgl_kernel_ext.triton_quantize import NOT_SPECIALIZED, e4m3_decode, locate, unpack


@triton.jit(**NOT_SPECIALIZED)
def decode_fp8(
    table, pages, rows, data, row_stride, first_byte,
    ELEMENT: tl.constexpr, PAGE_STRIDE: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, CHANNELS: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr, HEAD_STRIDE: tl.constexpr, CHANNEL_STRIDE: tl.constexpr,
    SCALE_AT: tl.constexpr,
    HAS_ROWS: tl.constexpr, POOL_ALIGN: tl.constexpr, DATA_ALIGN: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """A tile of a head from e4m3 codes and the head's scale."""
    TILES: tl.constexpr = tl.cdiv(TOKENS, BLOCK_TOKENS)
    head = tl.program_id(0) // TILES % HEADS
    inside, outside = locate(
        table, pages, rows, data, row_stride, first_byte, tl.program_id(0) // TILES // HEADS,
        PAGE_STRIDE, ELEMENT, HAS_ROWS, POOL_ALIGN, DATA_ALIGN,
    )  # fmt: skip
    t = tl.program_id(0) % TILES * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)[:, None]
    d = tl.arange(0, BLOCK_CHANNELS)[None, :]
    here = (t < TOKENS) & (d < CHANNELS)
    scale = tl.load((outside + SCALE_AT).to(tl.pointer_type(tl.float32)) + head)
    codes = tl.load(outside + (head * TOKENS + t) * CHANNELS + d, here, other=0)
    x = (e4m3_decode(codes) * scale).to(ELEMENT)
    tl.store(inside + head * HEAD_STRIDE + t * TOKEN_STRIDE + d * CHANNEL_STRIDE, x, here)


@triton.jit(**NOT_SPECIALIZED)
def decode_int(
    table, pages, rows, data, row_stride, first_byte,
    ELEMENT: tl.constexpr, PAGE_STRIDE: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, CHANNELS: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr, HEAD_STRIDE: tl.constexpr, CHANNEL_STRIDE: tl.constexpr,
    SCALE_AT: tl.constexpr, ZERO_AT: tl.constexpr, BITS: tl.constexpr,
    PER_CHANNEL: tl.constexpr, MASK_AT: tl.constexpr, LOW_BITS_AT: tl.constexpr,
    BOOSTED: tl.constexpr,
    HAS_ROWS: tl.constexpr, POOL_ALIGN: tl.constexpr, DATA_ALIGN: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """A tile of a head from codes of BITS bits, scales, zero points, and kitty's lower bits."""
    TILES: tl.constexpr = tl.cdiv(TOKENS, BLOCK_TOKENS)
    head = tl.program_id(0) // TILES % HEADS
    inside, outside = locate(
        table, pages, rows, data, row_stride, first_byte, tl.program_id(0) // TILES // HEADS,
        PAGE_STRIDE, ELEMENT, HAS_ROWS, POOL_ALIGN, DATA_ALIGN,
    )  # fmt: skip
    PER_BYTE: tl.constexpr = 8 // BITS
    N_BYTES: tl.constexpr = tl.cdiv(CHANNELS, PER_BYTE)
    t = tl.program_id(0) % TILES * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)[:, None]
    d = tl.arange(0, BLOCK_CHANNELS)[None, :]
    byte = tl.arange(0, BLOCK_CHANNELS // PER_BYTE)[None, :]
    there = (t < TOKENS) & (byte < N_BYTES)
    packed = tl.load(outside + (head * TOKENS + t) * N_BYTES + byte, there, other=0)
    codes = unpack(packed, BITS)
    if BOOSTED:
        MASK_BYTES: tl.constexpr = tl.cdiv(CHANNELS, 8)
        mask_byte = tl.arange(0, BLOCK_CHANNELS // 8)[None, :]
        mask_at = outside + MASK_AT + head * MASK_BYTES + mask_byte
        boosted = unpack(tl.load(mask_at, mask_byte < MASK_BYTES, other=0), 1)
        place = tl.cumsum(boosted, axis=1) - boosted
        at = outside + LOW_BITS_AT + (head * TOKENS + t) * tl.cdiv(BOOSTED, 4) + place // 4
        fine = tl.load(at, (t < TOKENS) & (boosted > 0), other=0).to(tl.int32)
        codes = tl.where(boosted > 0, (codes << 2) | ((fine >> (place % 4 * 2)) & 3), codes)
    scales = (outside + SCALE_AT).to(tl.pointer_type(tl.float16))
    zeros = (outside + ZERO_AT).to(tl.pointer_type(tl.float16))
    if PER_CHANNEL:
        scale = tl.load(scales + head * CHANNELS + d, d < CHANNELS, other=0.0)
        zero = tl.load(zeros + head * CHANNELS + d, d < CHANNELS, other=0.0)
    else:
        scale = tl.load(scales + head * TOKENS + t, t < TOKENS, other=0.0)
        zero = tl.load(zeros + head * TOKENS + t, t < TOKENS, other=0.0)
    x = (codes.to(tl.float32) * scale.to(tl.float32) + zero.to(tl.float32)).to(ELEMENT)
    here = (t < TOKENS) & (d < CHANNELS)
    tl.store(inside + head * HEAD_STRIDE + t * TOKEN_STRIDE + d * CHANNEL_STRIDE, x, here)
