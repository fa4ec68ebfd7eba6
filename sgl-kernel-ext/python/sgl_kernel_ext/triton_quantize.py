"""Device functions that the kernels share: where a page lies, and how elements become codes.

All of the arithmetic is that of `reference`, to the bit: divisions are rounded to nearest, and the
kernels are launched without fusing multiplications with additions.

e4m3 is converted with integer arithmetic, not with the hardware's instruction: one code path then
serves sm_80, which has no such instruction, AMD, whose e4m3 is another, and the interpreter, whose
conversion rounds differently.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Kernels are the same whatever these arguments are divisible by; the alignment that they rely on
#: is a constant. Else a slice of indices at an odd place would have a server wait for a compiler.
NOT_SPECIALIZED = {
    "do_not_specialize": ["row_stride", "first_byte"],
    "do_not_specialize_on_alignment": ["table", "pages", "rows", "data"],
}

FP8_MAX = tl.constexpr(448.0)
FP8_SCALE_MIN = tl.constexpr(2.0**-100)
FLOAT16_MAX = tl.constexpr(65504.0)


@triton.jit
def locate(
    table,
    pages,
    rows,
    data,
    row_stride,
    first_byte,
    i,
    PAGE_STRIDE: tl.constexpr,
    ELEMENT: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    POOL_ALIGN: tl.constexpr,
    DATA_ALIGN: tl.constexpr,
):
    """(pointer to the page in the pool, as ELEMENT; pointer to its bytes in the row).

    Pointers out of a table carry no alignment: without the hints loads and stores are scalar.
    """
    entry = table + 2 * tl.program_id(1)
    page = tl.load(pages + i).to(tl.int64)
    row = i.to(tl.int64)
    if HAS_ROWS:
        row = tl.load(rows + i).to(tl.int64)
    inside = tl.load(entry).to(tl.pointer_type(ELEMENT)) + page * PAGE_STRIDE
    outside = data + row * row_stride + (tl.load(entry + 1) - first_byte)
    return tl.multiple_of(inside, POOL_ALIGN), tl.multiple_of(outside, DATA_ALIGN)


@triton.jit
def load_tokens(
    inside,
    t,
    d,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr,
    CHANNEL_STRIDE: tl.constexpr,
):
    """The elements of tokens t and channels d of a head as float32; 0 where there are none."""
    here = (t[:, None] < TOKENS) & (d[None, :] < CHANNELS)
    x = tl.load(inside + t[:, None] * TOKEN_STRIDE + d[None, :] * CHANNEL_STRIDE, here, other=0.0)
    return x.to(tl.float32), here


@triton.jit
def e4m3_encode(x):
    """The e4m3 codes of float32 in [-448, 448], rounded to nearest even: int32, 0 to 255."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Normal numbers: round 20 bits off the mantissa, then move the exponent's bias from 127 to 7.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 codes count steps of 2^-9, which is how far apart float32 are from 2^14 on.
    steps = magnitude.to(tl.float32, bitcast=True) + 16384.0
    small = steps.to(tl.int32, bitcast=True) - 0x46800000
    return tl.where(magnitude < 0x3C800000, small, normal) | ((bits >> 24) & 0x80)


@triton.jit
def e4m3_decode(codes):
    """The float32 that e4m3 codes (uint8) stand for; those of NaN aren't ever written."""
    codes = codes.to(tl.int32)
    bits = ((codes & 0x7F) << 20) | ((codes & 0x80) << 24)
    # As float32 the exponent is 120 too small; a product mends that for subnormal codes as well.
    return bits.to(tl.float32, bitcast=True) * 1329227995784915872903807060280344576.0


@triton.jit
def zero_and_spread(low, high):
    """The zero points (float16), and how far above them each group reaches."""
    low = tl.minimum(tl.maximum(low, -FLOAT16_MAX), FLOAT16_MAX)
    high = tl.minimum(tl.maximum(high, -FLOAT16_MAX), FLOAT16_MAX)
    zero = low.to(tl.float16)
    return zero, tl.maximum(high - zero.to(tl.float32), 0.0)


@triton.jit
def scale_and_reciprocal(spread, steps):
    """The scales (float16), and what to multiply with; 0 for a group of equal elements."""
    scale = tl.div_rn(spread, steps).to(tl.float16)
    rounded = scale.to(tl.float32)
    safe = tl.where(rounded > 0, rounded, 1.0)
    return scale, tl.where(rounded > 0, tl.div_rn(1.0, safe), 0.0)


@triton.jit
def quantize(x, zero, reciprocal, steps):
    """The codes, 0 to `steps`, as int32; the arguments are broadcast against each other."""
    codes = (x - zero) * reciprocal + 0.5
    return tl.minimum(tl.maximum(codes, 0.0), steps).to(tl.int32)


@triton.jit
def pack(codes, BITS: tl.constexpr):
    """(rows, channels) int32 codes to (rows, bytes) uint8, the first channel lowest."""
    PER_BYTE: tl.constexpr = 8 // BITS
    groups = tl.reshape(codes, (codes.shape[0], codes.shape[1] // PER_BYTE, PER_BYTE))
    shifts = BITS * tl.arange(0, PER_BYTE)
    return tl.sum(groups << shifts[None, None, :], axis=2).to(tl.uint8)


@triton.jit
def unpack(packed, BITS: tl.constexpr):
    """(rows, bytes) uint8 to (rows, channels) int32 codes."""
    PER_BYTE: tl.constexpr = 8 // BITS
    shifts = BITS * tl.arange(0, PER_BYTE)
    codes = (packed.to(tl.int32)[:, :, None] >> shifts[None, None, :]) & ((1 << BITS) - 1)
    return tl.reshape(codes, (packed.shape[0], packed.shape[1] * PER_BYTE))
