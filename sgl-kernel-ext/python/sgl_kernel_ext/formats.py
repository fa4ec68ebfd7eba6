"""Where every byte of a KV page lies, in each format. Pure Python: no torch needed to ask.

A page is all layers' K and V for `page_size` tokens. It is layer-major, so that one layer is one
contiguous slice: layer 0's key buffer, layer 0's value buffer, layer 1's key buffer, ... A buffer's
share of the page is a run of sections (codes, scales, ...), each described by name, offset, shape
and element type, and the same in every page.

raw     the pool's own bytes, (tokens, heads, head_dim), with no padding anywhere.
fp8     e4m3 codes, (heads, tokens, head_dim), and a float32 scale per head.
int4    4-bit codes with a float16 scale and zero point, as in KIVI (arXiv 2402.02750): keys per
int2    channel over the page's tokens, values per token over the head's channels. 2 bits likewise.
kitty   int2, but the channels of each key head with the widest range have 4 bits, as in Kitty
        (arXiv 2511.18643): their upper two bits lie among the 2-bit codes of all channels, their
        lower two in a section of their own, beside a bit mask of these channels.

Codes and mask bits are packed along the channels, the first channel in a byte's low bits. Keys of
pages under MIN_TOKENS_PER_CHANNEL tokens are grouped per token as well: a scale for one or two
tokens of a channel would take more room than it saves; kitty is int2 there. An MLA pool's latent is
a key.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

#: Raise when the same format's bytes change their meaning.
FORMAT_VERSION = 1

#: Sections of the lossy formats start on this boundary: the widest load of a GPU thread.
SECTION_ALIGNMENT_BYTES = 16

#: Pages with fewer tokens have their keys grouped per token, not per channel.
MIN_TOKENS_PER_CHANNEL = 8

#: The part of a key head's channels to which kitty gives 4 bits.
KITTY_BOOSTED_PART = 1 / 8

ELEMENT_BYTES = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "uint8": 1,
}
#: What the lossy formats convert from and to.
FLOATS = ("float32", "bfloat16", "float16")


class Format(StrEnum):
    RAW = "raw"
    FP8 = "fp8"
    INT4 = "int4"
    INT2 = "int2"
    KITTY = "kitty"

    @property
    def is_lossy(self) -> bool:
        return self is not Format.RAW

    @property
    def code_bits(self) -> int:
        """Bits of each element's code; raw has none."""
        return {"raw": 0, "fp8": 8, "int4": 4, "int2": 2, "kitty": 2}[self.value]


class Role(StrEnum):
    """What a buffer holds decides along which axis its elements resemble each other."""

    KEY = "key"
    VALUE = "value"


@dataclass(frozen=True, slots=True)
class BufferSpec:
    """One device buffer: (token slots, n_heads, head_dim) of `dtype`, serving layer `layer`."""

    layer: int
    role: Role
    n_heads: int
    head_dim: int
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in ELEMENT_BYTES:
            raise ValueError(
                f"a KV pool of {self.dtype} is not supported; it must be one of "
                f"{', '.join(ELEMENT_BYTES)}"
            )
        if min(self.n_heads, self.head_dim) < 1 or self.layer < 0:
            raise ValueError(f"{self} has no elements; give it heads, channels and a layer")

    def kind(self, format_: Format) -> BufferSpec:
        """The same for all buffers that a format treats alike: of any layer, and in raw and fp8
        keys and values."""
        role = self.role if format_ in (Format.INT4, Format.INT2, Format.KITTY) else Role.KEY
        return dataclasses.replace(self, layer=0, role=role)

    @property
    def token_bytes(self) -> int:
        return self.n_heads * self.head_dim * ELEMENT_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Section:
    """An array in a buffer's share of the page; `offset` is in bytes from the share's start."""

    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * ELEMENT_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class BufferLayout:
    """A buffer's share of a page: `n_bytes` at `offset` (bytes from the page's start)."""

    spec: BufferSpec
    offset: int
    n_bytes: int
    sections: tuple[Section, ...]

    def section(self, name: str) -> Section:
        """The section of this name. Raises KeyError, naming those there are."""
        for section in self.sections:
            if section.name == name:
                return section
        raise KeyError(f"no section {name!r}; there are {[s.name for s in self.sections]}")


@dataclass(frozen=True, slots=True)
class PageLayout:
    """The layout of a page of `page_size` tokens; `buffers` in the order of the device buffers."""

    format: Format
    page_size: int
    buffers: tuple[BufferLayout, ...]

    @classmethod
    def of(cls, format_: Format, page_size: int, specs: Sequence[BufferSpec]) -> PageLayout:
        """Lays out a page. `specs` come layer by layer, layers numbered from 0 without a gap.

        Raises ValueError for another order, or a format that can't hold these buffers' dtype.
        """
        if page_size < 1:
            raise ValueError(f"a page of {page_size} tokens is empty; the page size is at least 1")
        layers = [spec.layer for spec in specs]
        if layers != sorted(layers) or set(layers) != set(range(len(set(layers)))) or not layers:
            raise ValueError("device buffers must be listed layer by layer, from layer 0 on")
        buffers = []
        offset = 0
        for spec in specs:
            sections = sections_of(format_, page_size, spec)
            n_bytes = sections[-1].offset + sections[-1].n_bytes
            if format_.is_lossy:
                n_bytes = aligned(n_bytes)
            buffers.append(BufferLayout(spec, offset, n_bytes, sections))
            offset += n_bytes
        return cls(format_, page_size, tuple(buffers))

    @property
    def page_bytes(self) -> int:
        last = self.buffers[-1]
        return last.offset + last.n_bytes

    @property
    def n_layers(self) -> int:
        return self.buffers[-1].spec.layer + 1

    @property
    def token_bytes(self) -> float:
        """Bytes per token, scales and padding included."""
        return self.page_bytes / self.page_size

    def layer_bytes(self, layers: range) -> tuple[int, int]:
        """(start, end) of the bytes of a run of layers. Raises ValueError if it is no such run."""
        if layers.step != 1 or not 0 <= layers.start < layers.stop <= self.n_layers:
            raise ValueError(f"{layers} is no run of this page's {self.n_layers} layers")
        inside = [b for b in self.buffers if b.spec.layer in layers]
        return inside[0].offset, inside[-1].offset + inside[-1].n_bytes

    def fingerprint(self) -> bytes:
        """32 bytes that differ whenever the same page's bytes would mean something else."""
        text = f"{FORMAT_VERSION}|{self.format}|{self.page_size}|{self.buffers}"
        return hashlib.sha256(text.encode()).digest()


def aligned(n_bytes: int) -> int:
    return -(-n_bytes // SECTION_ALIGNMENT_BYTES) * SECTION_ALIGNMENT_BYTES


def key_per_channel(page_size: int) -> bool:
    """Whether int4, int2 and kitty group a page's keys per channel, rather than per token."""
    return page_size >= MIN_TOKENS_PER_CHANNEL


def boosted_channels(head_dim: int) -> int:
    """How many channels of a key head kitty gives 4 bits: an eighth, in whole bytes of codes."""
    return min(head_dim, max(4, round(head_dim * KITTY_BOOSTED_PART / 4) * 4))


def sections_of(format_: Format, page_size: int, spec: BufferSpec) -> tuple[Section, ...]:
    """A buffer's sections, in order. Raises ValueError if the format can't hold the dtype."""
    heads, channels = spec.n_heads, spec.head_dim
    if format_ is Format.RAW:
        return (Section("data", 0, (page_size, heads, channels), spec.dtype),)
    if spec.dtype not in FLOATS:
        raise ValueError(
            f"{format_} pages need a KV pool of {', '.join(FLOATS)}, not {spec.dtype}; use raw"
        )
    codes_per_byte = 8 // format_.code_bits
    code_bytes = -(-channels // codes_per_byte)
    arrays: list[tuple[str, tuple[int, ...], str]] = [
        ("codes", (heads, page_size, code_bytes), "uint8")
    ]
    if format_ is Format.FP8:
        arrays += [("scale", (heads,), "float32")]
    else:
        per_channel = spec.role is Role.KEY and key_per_channel(page_size)
        groups = channels if per_channel else page_size
        arrays += [("scale", (heads, groups), "float16"), ("zero", (heads, groups), "float16")]
        if per_channel and format_ is Format.KITTY:
            n_boosted = boosted_channels(channels)
            arrays += [
                ("boosted", (heads, -(-channels // 8)), "uint8"),
                ("low_bits", (heads, page_size, -(-n_boosted // 4)), "uint8"),
            ]
    sections = []
    offset = 0
    for name, shape, dtype in arrays:
        section = Section(name, offset, shape, dtype)
        sections.append(section)
        offset = aligned(offset + section.n_bytes)
    return tuple(sections)
