"""Kernels that gather: pages of the pool to page-first rows, in each format.

A program of `copy_raw` moves a tile of a page of one buffer, one of the others a page's head. They
go over the tokens twice, first for the scales, then for the codes: a head's tile is a few KiB, so
the second time comes from the cache, and registers don't limit the page size.

table: (buffers, 2) of int64: a buffer's address, and its offset in a page.
pages, rows: int64, as in `ops`; `rows` isn't read unless HAS_ROWS.
data: uint8 rows, `row_stride` bytes apart, that begin with byte `first_byte` of a page.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sgl_kernel_ext.triton_quantize import (
    FP8_MAX,
    FP8_SCALE_MIN,
    NOT_SPECIALIZED,
    e4m3_encode,
    load_tokens,
    locate,
    pack,
    quantize,
    scale_and_reciprocal,
    zero_and_spread,
)


@triton.jit(**NOT_SPECIALIZED)
def copy_raw(
    table, pages, rows, data, row_stride, first_byte,
    WORD: tl.constexpr, TO_POOL: tl.constexpr, PAGE_STRIDE: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, LENGTH: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr, HEAD_STRIDE: tl.constexpr, INNER_STRIDE: tl.constexpr,
    HAS_ROWS: tl.constexpr, POOL_ALIGN: tl.constexpr, DATA_ALIGN: tl.constexpr,
    BLOCK_RUNS: tl.constexpr, BLOCK_LENGTH: tl.constexpr,
):  # fmt: skip
    """Moves bytes as WORDs, either way: TOKENS x HEADS runs of LENGTH words.

    Runs lie behind each other in a row; strides, in words, say where they are in the pool.
    """
    RUNS: tl.constexpr = TOKENS * HEADS
    CHUNKS: tl.constexpr = tl.cdiv(LENGTH, BLOCK_LENGTH)
    TILES: tl.constexpr = CHUNKS * tl.cdiv(RUNS, BLOCK_RUNS)
    tile = tl.program_id(0) % TILES
    inside, outside = locate(
        table, pages, rows, data, row_stride, first_byte, tl.program_id(0) // TILES,
        PAGE_STRIDE, WORD, HAS_ROWS, POOL_ALIGN, DATA_ALIGN,
    )  # fmt: skip
    run = tile // CHUNKS * BLOCK_RUNS + tl.arange(0, BLOCK_RUNS)[:, None]
    word = tile % CHUNKS * BLOCK_LENGTH + tl.arange(0, BLOCK_LENGTH)[None, :]
    in_pool = inside + run // HEADS * TOKEN_STRIDE + run % HEADS * HEAD_STRIDE + word * INNER_STRIDE
    in_row = outside.to(tl.pointer_type(WORD)) + run * LENGTH + word
    here = (run < RUNS) & (word < LENGTH)
    if TO_POOL:
        tl.store(in_pool, tl.load(in_row, here), here)
    else:
        tl.store(in_row, tl.load(in_pool, here), here)


@triton.jit(**NOT_SPECIALIZED)
def encode_fp8(
    table, pages, rows, data, row_stride, first_byte,
    ELEMENT: tl.constexpr, PAGE_STRIDE: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, CHANNELS: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr, HEAD_STRIDE: tl.constexpr, CHANNEL_STRIDE: tl.constexpr,
    SCALE_AT: tl.constexpr,
    HAS_ROWS: tl.constexpr, POOL_ALIGN: tl.constexpr, DATA_ALIGN: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """e4m3 codes, and a float32 scale for the head."""
    head = tl.program_id(0) % HEADS
    inside, outside = locate(
        table, pages, rows, data, row_stride, first_byte, tl.program_id(0) // HEADS,
        PAGE_STRIDE, ELEMENT, HAS_ROWS, POOL_ALIGN, DATA_ALIGN,
    )  # fmt: skip
    inside += head * HEAD_STRIDE
    d = tl.arange(0, BLOCK_CHANNELS)
    largest = 0.0
    for start in range(0, TOKENS, BLOCK_TOKENS):
        t = start + tl.arange(0, BLOCK_TOKENS)
        x, _ = load_tokens(inside, t, d, TOKENS, CHANNELS, TOKEN_STRIDE, CHANNEL_STRIDE)
        largest = tl.maximum(largest, tl.max(tl.abs(x)))
    scale = tl.maximum(tl.div_rn(largest, FP8_MAX), FP8_SCALE_MIN)
    tl.store((outside + SCALE_AT).to(tl.pointer_type(tl.float32)) + head, scale)
    reciprocal = tl.div_rn(1.0, scale)
    for start in range(0, TOKENS, BLOCK_TOKENS):
        t = start + tl.arange(0, BLOCK_TOKENS)
        x, here = load_tokens(inside, t, d, TOKENS, CHANNELS, TOKEN_STRIDE, CHANNEL_STRIDE)
        codes = e4m3_encode(tl.minimum(tl.maximum(x * reciprocal, -FP8_MAX), FP8_MAX))
        at = (head * TOKENS + t[:, None]) * CHANNELS + d[None, :]
        tl.store(outside + at, codes.to(tl.uint8), here)


@triton.jit(**NOT_SPECIALIZED)
def encode_per_token(
    table, pages, rows, data, row_stride, first_byte,
    ELEMENT: tl.constexpr, PAGE_STRIDE: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, CHANNELS: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr, HEAD_STRIDE: tl.constexpr, CHANNEL_STRIDE: tl.constexpr,
    SCALE_AT: tl.constexpr, ZERO_AT: tl.constexpr, BITS: tl.constexpr,
    HAS_ROWS: tl.constexpr, POOL_ALIGN: tl.constexpr, DATA_ALIGN: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Codes of BITS bits, with a scale and a zero point for each token of the head."""
    head = tl.program_id(0) % HEADS
    inside, outside = locate(
        table, pages, rows, data, row_stride, first_byte, tl.program_id(0) // HEADS,
        PAGE_STRIDE, ELEMENT, HAS_ROWS, POOL_ALIGN, DATA_ALIGN,
    )  # fmt: skip
    inside += head * HEAD_STRIDE
    PER_BYTE: tl.constexpr = 8 // BITS
    N_BYTES: tl.constexpr = tl.cdiv(CHANNELS, PER_BYTE)
    d = tl.arange(0, BLOCK_CHANNELS)
    byte = tl.arange(0, BLOCK_CHANNELS // PER_BYTE)
    scales = (outside + SCALE_AT).to(tl.pointer_type(tl.float16)) + head * TOKENS
    zeros = (outside + ZERO_AT).to(tl.pointer_type(tl.float16)) + head * TOKENS
    for start in range(0, TOKENS, BLOCK_TOKENS):
        t = start + tl.arange(0, BLOCK_TOKENS)
        x, here = load_tokens(inside, t, d, TOKENS, CHANNELS, TOKEN_STRIDE, CHANNEL_STRIDE)
        low = tl.min(tl.where(here, x, float("inf")), axis=1)
        high = tl.max(tl.where(here, x, float("-inf")), axis=1)
        zero, spread = zero_and_spread(low, high)
        steps = tl.zeros_like(spread) + ((1 << BITS) - 1.0)
        scale, reciprocal = scale_and_reciprocal(spread, steps)
        tl.store(scales + t, scale, t < TOKENS)
        tl.store(zeros + t, zero, t < TOKENS)
        zero = zero.to(tl.float32)
        codes = quantize(x, zero[:, None], reciprocal[:, None], steps[:, None])
        packed = pack(tl.where(here, codes, 0), BITS)
        at = (head * TOKENS + t[:, None]) * N_BYTES + byte[None, :]
        tl.store(outside + at, packed, (t[:, None] < TOKENS) & (byte[None, :] < N_BYTES))


@triton.jit(**NOT_SPECIALIZED)
def encode_per_channel(
    table, pages, rows, data, row_stride, first_byte,
    ELEMENT: tl.constexpr, PAGE_STRIDE: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, CHANNELS: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr, HEAD_STRIDE: tl.constexpr, CHANNEL_STRIDE: tl.constexpr,
    SCALE_AT: tl.constexpr, ZERO_AT: tl.constexpr, BITS: tl.constexpr,
    MASK_AT: tl.constexpr, LOW_BITS_AT: tl.constexpr,
    BOOSTED: tl.constexpr, BLOCK_BOOSTED: tl.constexpr,
    HAS_ROWS: tl.constexpr, POOL_ALIGN: tl.constexpr, DATA_ALIGN: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Codes of BITS bits, with a scale and a zero point for each channel of the head.

    The BOOSTED channels of widest range get two bits more, in a section of their own.
    """
    head = tl.program_id(0) % HEADS
    inside, outside = locate(
        table, pages, rows, data, row_stride, first_byte, tl.program_id(0) // HEADS,
        PAGE_STRIDE, ELEMENT, HAS_ROWS, POOL_ALIGN, DATA_ALIGN,
    )  # fmt: skip
    inside += head * HEAD_STRIDE
    PER_BYTE: tl.constexpr = 8 // BITS
    N_BYTES: tl.constexpr = tl.cdiv(CHANNELS, PER_BYTE)
    d = tl.arange(0, BLOCK_CHANNELS)
    byte = tl.arange(0, BLOCK_CHANNELS // PER_BYTE)
    low = tl.full((BLOCK_CHANNELS,), float("inf"), tl.float32)
    high = tl.full((BLOCK_CHANNELS,), float("-inf"), tl.float32)
    for start in range(0, TOKENS, BLOCK_TOKENS):
        t = start + tl.arange(0, BLOCK_TOKENS)
        x, here = load_tokens(inside, t, d, TOKENS, CHANNELS, TOKEN_STRIDE, CHANNEL_STRIDE)
        low = tl.minimum(low, tl.min(tl.where(here, x, float("inf")), axis=0))
        high = tl.maximum(high, tl.max(tl.where(here, x, float("-inf")), axis=0))
    zero, spread = zero_and_spread(low, high)
    steps = tl.zeros_like(spread) + ((1 << BITS) - 1.0)
    boosted = d < 0
    if BOOSTED:
        boosted = widest(spread, d, CHANNELS, BOOSTED, BLOCK_CHANNELS)
        steps = tl.where(boosted, 15.0, steps)
    scale, reciprocal = scale_and_reciprocal(spread, steps)
    scales = (outside + SCALE_AT).to(tl.pointer_type(tl.float16)) + head * CHANNELS
    zeros = (outside + ZERO_AT).to(tl.pointer_type(tl.float16)) + head * CHANNELS
    tl.store(scales + d, scale, d < CHANNELS)
    tl.store(zeros + d, zero, d < CHANNELS)
    zero = zero.to(tl.float32)
    for start in range(0, TOKENS, BLOCK_TOKENS):
        t = start + tl.arange(0, BLOCK_TOKENS)
        x, here = load_tokens(inside, t, d, TOKENS, CHANNELS, TOKEN_STRIDE, CHANNEL_STRIDE)
        codes = quantize(x, zero[None, :], reciprocal[None, :], steps[None, :])
        codes = tl.where(here, tl.where(boosted[None, :], codes >> 2, codes), 0)
        at = (head * TOKENS + t[:, None]) * N_BYTES + byte[None, :]
        there = (t[:, None] < TOKENS) & (byte[None, :] < N_BYTES)
        tl.store(outside + at, pack(codes, BITS), there)
    if BOOSTED:
        MASK_BYTES: tl.constexpr = tl.cdiv(CHANNELS, 8)
        mask_byte = tl.arange(0, BLOCK_CHANNELS // 8)[None, :]
        mask_at = outside + MASK_AT + head * MASK_BYTES + mask_byte
        tl.store(mask_at, pack(boosted.to(tl.int32)[None, :], 1), mask_byte < MASK_BYTES)
        store_low_bits(
            inside, outside + LOW_BITS_AT, head, d, boosted, zero, reciprocal,
            TOKENS, CHANNELS, TOKEN_STRIDE, CHANNEL_STRIDE,
            BOOSTED, BLOCK_BOOSTED, BLOCK_TOKENS, BLOCK_CHANNELS,
        )  # fmt: skip


@triton.jit
def widest(spread, d, CHANNELS: tl.constexpr, BOOSTED: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """Which BOOSTED of the channels have the widest range; of equal ones the first."""
    # Floats from 0 on are ordered as their bits are; the channel makes every key another.
    keys = (spread.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (BLOCK_CHANNELS - d)
    keys = tl.where(d < CHANNELS, keys, 0)
    least = tl.sum(tl.where(d == BOOSTED - 1, tl.sort(keys, descending=True), 0))
    return keys >= least


@triton.jit
def store_low_bits(
    inside, low_bits, head, d, boosted, zero, reciprocal,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr, CHANNEL_STRIDE: tl.constexpr,
    BOOSTED: tl.constexpr, BLOCK_BOOSTED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Writes the lower two bits of the boosted channels' codes, side by side."""
    N_BYTES: tl.constexpr = tl.cdiv(BOOSTED, 4)
    first = tl.topk(tl.where(boosted, BLOCK_CHANNELS - d, 0), BLOCK_BOOSTED)
    channel = tl.where(first > 0, BLOCK_CHANNELS - first, CHANNELS)
    index = tl.where(first > 0, channel, 0)
    zero = tl.gather(zero, index, 0)[None, :]
    reciprocal = tl.gather(reciprocal, index, 0)[None, :]
    byte = tl.arange(0, BLOCK_BOOSTED // 4)[None, :]
    for start in range(0, TOKENS, BLOCK_TOKENS):
        t = start + tl.arange(0, BLOCK_TOKENS)
        x, here = load_tokens(inside, t, channel, TOKENS, CHANNELS, TOKEN_STRIDE, CHANNEL_STRIDE)
        codes = tl.where(here, quantize(x, zero, reciprocal, 15.0) & 3, 0)
        at = (head * TOKENS + t[:, None]) * N_BYTES + byte
        tl.store(low_bits + at, pack(codes, 2), (t[:, None] < TOKENS) & (byte < N_BYTES))
