"""The lossy formats in vectorised torch: whole batches of pages to bytes and back.

Same results as `reference`, to the bit. Steps are chosen for CPUs: torch vectorises neither
aminmax, nor conversions to uint8, nor those from e4m3.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from sgl_kernel_ext.formats import BufferLayout, Format, Role, boosted_channels, key_per_channel
from sgl_kernel_ext.reference import FLOAT16_MAX, FP8_MAX, FP8_SCALE_MIN

#: Integers of a size in bytes.
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def viewed(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(..., bytes) of uint8 as (..., elements) of `dtype`; copies only if addresses are odd."""
    odd = [data.data_ptr(), *data.stride()[:-1]]
    if data.stride(-1) != 1 or any(n % dtype.itemsize for n in odd):
        data = data.clone(memory_format=torch.contiguous_format)
    return data.view(dtype)


def encode(x: torch.Tensor, out: torch.Tensor, share: BufferLayout, format_: Format) -> None:
    """Writes the sections of x, (pages, heads, page_size, head_dim) of float32, to `out`.

    out: (pages, share.n_bytes) of uint8. Padding between sections is left as it is.
    """
    if format_ is Format.FP8:
        largest = torch.maximum(x.amax((2, 3), keepdim=True), -x.amin((2, 3), keepdim=True))
        scale = (largest / FP8_MAX).clamp_(min=FP8_SCALE_MIN)
        codes = (x * (1 / scale)).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        store(out, share, "codes", codes)
        store(out, share, "scale", scale)
        return
    axis = group_axis(share, x.shape[2])
    low, high = (m.clamp_(-FLOAT16_MAX, FLOAT16_MAX) for m in (x.amin(axis), x.amax(axis)))
    zero = low.half()
    spread = (high - zero.float()).clamp_(min=0)
    steps = torch.full_like(spread, 2**format_.code_bits - 1)
    boosted = widest_channels(spread, share)
    if boosted is not None:
        steps.scatter_(2, boosted, 15)
    scale = (spread / steps).half()
    store(out, share, "scale", scale)
    store(out, share, "zero", zero)
    rounded = scale.float()
    reciprocal = torch.where(rounded > 0, 1 / rounded, 0)
    positions = (x - zero.float().unsqueeze(axis)).mul_(reciprocal.unsqueeze(axis)).add_(0.5)
    highest = 15 if boosted is not None else 2**format_.code_bits - 1
    codes = positions.clamp_(0, highest).to(torch.int8).view(torch.uint8)
    if boosted is not None:
        codes = torch.minimum(codes, steps.to(torch.uint8).unsqueeze(axis))
        columns = boosted.unsqueeze(2).expand(-1, -1, x.shape[2], -1)
        fine = codes.gather(3, columns)
        codes.scatter_(3, columns, fine >> 2)
        store(out, share, "low_bits", pack(fine & 3, 2))
        mask = spread.new_zeros(spread.shape, dtype=torch.uint8).scatter_(2, boosted, 1)
        store(out, share, "boosted", pack(mask, 1))
    store(out, share, "codes", pack(codes, format_.code_bits))


def decode(data: torch.Tensor, share: BufferLayout, format_: Format) -> torch.Tensor:
    """The (pages, heads, page_size, head_dim) float32 elements of (pages, share.n_bytes)."""
    codes = load(data, share, "codes")
    if format_ is Format.FP8:
        return e4m3_decode(codes).mul_(load(data, share, "scale")[..., None, None])
    axis = group_axis(share, codes.shape[2])
    values = unpack(codes, format_.code_bits, share.spec.head_dim)
    if any(section.name == "boosted" for section in share.sections):
        mask = unpack(load(data, share, "boosted"), 1, share.spec.head_dim)
        # A stable sort brings the channels of the mask to the front, in their order.
        n_boosted = boosted_channels(share.spec.head_dim)
        boosted = torch.sort(mask, dim=2, descending=True, stable=True).indices[..., :n_boosted]
        low_bits = unpack(load(data, share, "low_bits"), 2, n_boosted)
        columns = boosted.unsqueeze(2).expand(-1, -1, values.shape[2], -1)
        values.scatter_(3, columns, values.gather(3, columns) << 2 | low_bits)
    scale, zero = (load(data, share, name).float().unsqueeze(axis) for name in ("scale", "zero"))
    return values.float().mul_(scale).add_(zero)


def e4m3_decode(codes: torch.Tensor) -> torch.Tensor:
    """float32 of e4m3 codes, several times as fast on a CPU as torch's own conversion.

    Sign, exponent and mantissa are moved to where float32 has them. The exponent is then 120 too
    small, which a product mends for subnormal codes as well.
    """
    bits = codes.view(torch.int8).to(torch.int32).bitwise_left_shift_(20)
    return bits.bitwise_and_(-0x78100000).view(torch.float32).mul_(2.0**120)


def group_axis(share: BufferLayout, page_size: int) -> int:
    """The axis of (pages, heads, tokens, channels) along which a group's elements lie."""
    return 2 if share.spec.role is Role.KEY and key_per_channel(page_size) else 3


def widest_channels(spread: torch.Tensor, share: BufferLayout) -> torch.Tensor | None:
    """The channels of each head that get 4 bits, ascending: (pages, heads, boosted) of int64."""
    for section in share.sections:
        if section.name == "boosted":
            widest_first = torch.sort(spread, dim=2, descending=True, stable=True).indices
            return widest_first[..., : boosted_channels(spread.shape[2])].sort(dim=2).values
    return None


def store(out: torch.Tensor, share: BufferLayout, name: str, array: torch.Tensor) -> None:
    section = share.section(name)
    bytes_ = array.contiguous().flatten(1).view(torch.uint8)
    out[:, section.offset : section.offset + section.n_bytes] = bytes_


def load(data: torch.Tensor, share: BufferLayout, name: str) -> torch.Tensor:
    """A section as (pages, *its shape)."""
    section = share.section(name)
    run = data[:, section.offset : section.offset + section.n_bytes]
    return viewed(run, getattr(torch, section.dtype)).unflatten(1, section.shape)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """(..., channels) uint8 codes to (..., bytes), the first channel in a byte's low bits.

    Neighbours are taken as one little-endian integer, and moved together by shifts.
    """
    per_byte = 8 // bits
    if codes.shape[-1] % per_byte:
        codes = pad(codes, (0, -codes.shape[-1] % per_byte))
    together = viewed(codes, WORDS[per_byte])
    packed = together.clone()
    for i in range(1, per_byte):
        packed |= together >> (i * (8 - bits))
    return packed.to(torch.uint8)


def unpack(packed: torch.Tensor, bits: int, channels: int) -> torch.Tensor:
    """(..., bytes) to (..., channels) uint8 codes."""
    per_byte = 8 // bits
    together = packed.to(WORDS[per_byte])
    spread = together.clone()
    for i in range(1, per_byte):
        spread |= together << (i * (8 - bits))
    spread &= int.from_bytes(bytes([2**bits - 1]) * per_byte, "little")
    return spread.view(torch.uint8)[..., :channels]
