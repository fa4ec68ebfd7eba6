"""The ops in vectorised torch: what serves on a CPU, and on any device without Triton.

Buffer by buffer, and for the lossy formats in blocks of pages whose float32 intermediates stay in a
core's cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from sgl_kernel_ext.formats import (
    BufferLayout,
    Format,
    PageLayout,
    Role,
    boosted_channels,
    key_per_channel,
)
from sgl_kernel_ext.reference import FLOAT16_MAX, FP8_MAX, FP8_SCALE_MIN

if TYPE_CHECKING:
    from sgl_kernel_ext.ops import PageCopy

#: Integers of an element's size: raw bytes are moved as these, whatever they mean.
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}

#: Elements of a buffer that are converted at a time: 1 MiB of float32.
BLOCK_ELEMENTS = 1 << 18


class TorchBackend:
    """See `ops.PagePool` for the arguments."""

    def __init__(self, buffers: Sequence[torch.Tensor], layout: PageLayout) -> None:
        self._layout = layout
        self._pages = [pages_of(buffer, layout.page_size) for buffer in buffers]

    def gather(self, copy: PageCopy) -> None:
        data = copy.data
        if copy.rows is not None:
            data = data.new_zeros((len(copy.pages), copy.n_bytes))
        for share, pool, block in self._blocks(copy):
            start = share.offset - copy.first_byte
            out = data[block, start : start + share.n_bytes]
            picked = pool.index_select(0, copy.pages[block])
            if self._layout.format.is_lossy:
                picked = picked.view(getattr(torch, share.spec.dtype))
                encode(picked.transpose(1, 2).float(), out, share, self._layout.format)
            else:
                out.copy_(picked.contiguous().flatten(1).view(torch.uint8))
        if copy.rows is not None:
            copy.data[:, : copy.n_bytes].index_copy_(0, copy.rows, data)

    def scatter(self, copy: PageCopy) -> None:
        data = copy.data
        if copy.rows is not None:
            data = data[:, : copy.n_bytes].index_select(0, copy.rows)
        for share, pool, block in self._blocks(copy):
            start = share.offset - copy.first_byte
            source = data[block, start : start + share.n_bytes]
            if self._layout.format.is_lossy:
                elements = decode(source, share, self._layout.format)
                words = elements.to(getattr(torch, share.spec.dtype)).view(pool.dtype)
                words = words.transpose(1, 2)
            else:
                words = viewed(source, pool.dtype).view(-1, *pool.shape[1:])
            pool.index_copy_(0, copy.pages[block], words)

    def _blocks(self, copy: PageCopy) -> list[tuple[BufferLayout, torch.Tensor, slice]]:
        """(share, buffer, pages of the call) to convert at a time."""
        blocks = []
        n_pages = len(copy.pages)
        for share, pool in zip(self._layout.buffers, self._pages, strict=True):
            if share.spec.layer not in copy.layers:
                continue
            step = n_pages
            if self._layout.format.is_lossy:
                step = max(1, BLOCK_ELEMENTS // pool[0].numel())
            for start in range(0, n_pages, step):
                blocks.append((share, pool, slice(start, min(start + step, n_pages))))
        return blocks


def pages_of(buffer: torch.Tensor, page_size: int) -> torch.Tensor:
    """(slots, heads, head_dim) seen as (pages, page_size, heads, head_dim) integers; no copy."""
    n_pages = buffer.shape[0] // page_size
    words = buffer[: n_pages * page_size].view(WORDS[buffer.element_size()])
    return words.unflatten(0, (n_pages, page_size))


def viewed(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(rows, bytes) as (rows, elements) of `dtype`; copies only if the rows are apart."""
    data = data.contiguous()
    if data.data_ptr() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype)


def encode(x: torch.Tensor, out: torch.Tensor, share: BufferLayout, format_: Format) -> None:
    """Writes the sections of x, (pages, heads, page_size, head_dim) of float32, to `out`.

    out: (pages, share.n_bytes) of uint8. Padding between sections is left as it is.
    """
    if format_ is Format.FP8:
        scale = (x.abs().amax((2, 3), keepdim=True) / FP8_MAX).clamp_(min=FP8_SCALE_MIN)
        codes = (x * (1 / scale)).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        store(out, share, "codes", codes)
        store(out, share, "scale", scale)
        return
    axis = group_axis(share, x.shape[2])
    low, high = (bound.clamp_(-FLOAT16_MAX, FLOAT16_MAX) for bound in x.aminmax(dim=axis))
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
    zero, reciprocal, steps = (t.unsqueeze(axis) for t in (zero.float(), reciprocal, steps))
    codes = ((x - zero) * reciprocal).add_(0.5).clamp_(min=0).clamp_(max=steps).to(torch.uint8)
    if boosted is not None:
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
        return codes.view(torch.float8_e4m3fn).float() * load(data, share, "scale")[..., None, None]
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
    return viewed(run, getattr(torch, section.dtype)).view(-1, *section.shape)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """(..., channels) codes to (..., bytes), the first channel in a byte's low bits."""
    per_byte = 8 // bits
    if codes.shape[-1] % per_byte:
        codes = pad(codes, (0, -codes.shape[-1] % per_byte))
    groups = codes.unflatten(-1, (-1, per_byte))
    packed = groups[..., 0].clone()
    for i in range(1, per_byte):
        packed |= groups[..., i] << (bits * i)
    return packed


def unpack(packed: torch.Tensor, bits: int, channels: int) -> torch.Tensor:
    """(..., bytes) to (..., channels) codes."""
    per_byte = 8 // bits
    codes = torch.stack([packed >> (bits * i) for i in range(per_byte)], dim=-1)
    return (codes & (2**bits - 1)).flatten(-2)[..., :channels]
