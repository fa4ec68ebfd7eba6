"""What the ops mean, in plain torch: page by page and head by head, for reading, not for speed.

Every other implementation is tested against this one. Arithmetic is float32 and in this order, so
that others can agree to the bit: subtract, multiply by the reciprocal, add a half, round down.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sgl_kernel_ext.formats import (
    BufferLayout,
    Format,
    PageLayout,
    Role,
    boosted_channels,
    key_per_channel,
)

#: The largest e4m3 number; this format has no infinity.
FP8_MAX = 448.0
#: Below this a head is as good as zero; its reciprocal would overflow.
FP8_SCALE_MIN = 2.0**-100
FLOAT16_MAX = 65504.0


def gather(
    buffers: Sequence[torch.Tensor],
    layout: PageLayout,
    pages: Sequence[int],
    out: torch.Tensor,
) -> None:
    """Writes page `pages[i]` of the pool into row i of `out`: (pages, page_bytes) of uint8.

    Page p is rows [p * page_size, (p + 1) * page_size) of every (slots, heads, head_dim) buffer.
    """
    for row, page in enumerate(pages):
        for share, buffer in zip(layout.buffers, buffers, strict=True):
            tokens = buffer[page * layout.page_size : (page + 1) * layout.page_size]
            out[row, share.offset : share.offset + share.n_bytes] = encode(
                tokens, share, layout.format
            )


def scatter(
    buffers: Sequence[torch.Tensor],
    layout: PageLayout,
    pages: Sequence[int],
    source: torch.Tensor,
) -> None:
    """Writes row i of `source`, as `gather` made it, to page `pages[i]` of the pool."""
    for row, page in enumerate(pages):
        for share, buffer in zip(layout.buffers, buffers, strict=True):
            tokens = buffer[page * layout.page_size : (page + 1) * layout.page_size]
            data = source[row, share.offset : share.offset + share.n_bytes]
            tokens.copy_(decode(data, share, layout.format, layout.page_size))


def encode(tokens: torch.Tensor, share: BufferLayout, format_: Format) -> torch.Tensor:
    """The bytes of (page_size, heads, head_dim) tokens: uint8, `share.n_bytes` of them."""
    if format_ is Format.RAW:
        return tokens.contiguous().flatten().view(torch.uint8)
    data = torch.zeros(share.n_bytes, dtype=torch.uint8)
    for head in range(share.spec.n_heads):
        arrays = encode_head(tokens[:, head].float(), share, format_)
        for name, array in arrays.items():
            section_view(data, share, name)[head] = array
    return data


def decode(
    data: torch.Tensor, share: BufferLayout, format_: Format, page_size: int
) -> torch.Tensor:
    """The (page_size, heads, head_dim) tokens that a buffer's bytes stand for."""
    spec = share.spec
    dtype = getattr(torch, spec.dtype)
    if format_ is Format.RAW:
        return data.clone().view(dtype).reshape(page_size, spec.n_heads, spec.head_dim)
    heads = []
    for head in range(spec.n_heads):
        arrays = {s.name: section_view(data, share, s.name)[head] for s in share.sections}
        heads.append(decode_head(arrays, share, format_).to(dtype))
    return torch.stack(heads, dim=1)


def section_view(data: torch.Tensor, share: BufferLayout, name: str) -> torch.Tensor:
    """A section of a buffer's bytes as the array that it is."""
    section = share.section(name)
    dtype = getattr(torch, section.dtype)
    run = data[section.offset : section.offset + section.n_bytes]
    if run.storage_offset() % dtype.itemsize:
        run = run.clone()
    return run.view(dtype).reshape(section.shape)


def encode_head(x: torch.Tensor, share: BufferLayout, format_: Format) -> dict[str, torch.Tensor]:
    """The arrays of one head's (page_size, head_dim) float32 elements, by section."""
    if format_ is Format.FP8:
        scale = (x.abs().max() / FP8_MAX).clamp(min=FP8_SCALE_MIN)
        codes = (x * (1 / scale)).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        return {"codes": codes.view(torch.uint8), "scale": scale}
    per_channel = share.spec.role is Role.KEY and key_per_channel(x.shape[0])
    axis = 0 if per_channel else 1
    low = x.amin(axis).clamp(-FLOAT16_MAX, FLOAT16_MAX)
    high = x.amax(axis).clamp(-FLOAT16_MAX, FLOAT16_MAX)
    zero = low.half()
    spread = (high - zero.float()).clamp(min=0)
    steps = torch.full_like(spread, 2**format_.code_bits - 1)
    names = {section.name for section in share.sections}
    boosted = torch.empty(0, dtype=torch.long)
    if "boosted" in names:
        n_boosted = boosted_channels(x.shape[1])
        # A stable sort, so that of equal channels the first are chosen.
        widest_first = torch.sort(spread, descending=True, stable=True).indices
        boosted = widest_first[:n_boosted].sort().values
        steps[boosted] = 15
    scale = (spread / steps).half()
    codes = quantize(x, zero.float(), scale.float(), steps, axis)
    arrays = {"scale": scale, "zero": zero}
    if "boosted" in names:
        mask = torch.zeros(1, x.shape[1], dtype=torch.uint8)
        mask[0, boosted] = 1
        arrays["boosted"] = pack(mask, 1)[0]
        arrays["low_bits"] = pack(codes[:, boosted] % 4, 2)
        codes[:, boosted] //= 4
    arrays["codes"] = pack(codes, format_.code_bits)
    return arrays


def quantize(
    x: torch.Tensor, zero: torch.Tensor, scale: torch.Tensor, steps: torch.Tensor, axis: int
) -> torch.Tensor:
    """The codes, 0 to `steps`, of x with one zero point, scale and number of steps per group."""
    reciprocal = torch.where(scale > 0, 1 / scale, 0)
    zero, reciprocal, steps = (group.unsqueeze(axis) for group in (zero, reciprocal, steps))
    codes = torch.floor((x - zero) * reciprocal + 0.5)
    return codes.clamp(min=torch.zeros_like(steps), max=steps).to(torch.uint8)


def decode_head(
    arrays: dict[str, torch.Tensor], share: BufferLayout, format_: Format
) -> torch.Tensor:
    """One head's (page_size, head_dim) float32 elements."""
    if format_ is Format.FP8:
        return arrays["codes"].view(torch.float8_e4m3fn).float() * arrays["scale"]
    head_dim = share.spec.head_dim
    codes = unpack(arrays["codes"], format_.code_bits, head_dim)
    if "boosted" in arrays:
        boosted = unpack(arrays["boosted"][None], 1, head_dim)[0].nonzero().flatten()
        low_bits = unpack(arrays["low_bits"], 2, len(boosted))
        codes[:, boosted] = codes[:, boosted] * 4 + low_bits
    per_channel = share.spec.role is Role.KEY and key_per_channel(codes.shape[0])
    axis = 0 if per_channel else 1
    scale, zero = (arrays[name].float().unsqueeze(axis) for name in ("scale", "zero"))
    return codes * scale + zero


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """(tokens, channels) codes of `bits` bits each, several to a byte, the first lowest."""
    tokens, channels = codes.shape
    per_byte = 8 // bits
    packed = torch.zeros(tokens, -(-channels // per_byte), dtype=torch.uint8)
    for channel in range(channels):
        packed[:, channel // per_byte] |= codes[:, channel] << (bits * (channel % per_byte))
    return packed


def unpack(packed: torch.Tensor, bits: int, channels: int) -> torch.Tensor:
    """The (tokens, channels) codes that `pack` packed."""
    per_byte = 8 // bits
    columns = [
        (packed[:, channel // per_byte] >> (bits * (channel % per_byte))) % 2**bits
        for channel in range(channels)
    ]
    return torch.stack(columns, dim=1)
