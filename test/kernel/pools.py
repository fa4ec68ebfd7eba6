"""Builders: device pools of every shape the ops have to take, and what to expect of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from sgl_kernel_ext import reference
from sgl_kernel_ext.formats import Format, PageLayout, Role
from sgl_kernel_ext.ops import layout_of

N_PAGES = 7
ARRANGEMENTS = ("tokens first", "heads first", "k and v interleaved", "channels apart")


@dataclass(frozen=True)
class Shape:
    """A pool: `head_dims` of a layer's buffers, one for MLA, two for keys and values."""

    page_size: int
    n_heads: int
    head_dims: tuple[int, ...]
    dtype: torch.dtype
    n_layers: int = 2
    arrangement: str = "tokens first"

    @property
    def layers(self) -> list[int]:
        return [layer for layer in range(self.n_layers) for _ in self.head_dims]

    @property
    def roles(self) -> list[Role]:
        return [Role.KEY, Role.VALUE][: len(self.head_dims)] * self.n_layers

    def layout(self, format_: Format) -> PageLayout:
        return layout_of(format_, self.page_size, self.pool(0), self.layers, self.roles)

    def pool(self, seed: int) -> list[torch.Tensor]:
        """Buffers of random elements, with channels of very different range and offset.

        A pool has a tail of one slot more than its whole pages, which no op may touch.
        """
        generator = torch.Generator().manual_seed(seed)
        n_slots = N_PAGES * self.page_size + 1
        buffers = []
        for _, head_dim in itertools.product(range(self.n_layers), self.head_dims):
            size = (n_slots, self.n_heads, head_dim)
            x = torch.randn(size, generator=generator)
            ranges = torch.randn(self.n_heads, head_dim, generator=generator).exp()
            offsets = 3 * torch.randn(self.n_heads, head_dim, generator=generator)
            if self.dtype == torch.uint8:
                data = torch.randint(256, size, generator=generator, dtype=torch.uint8)
            else:
                data = (x * ranges + offsets).to(self.dtype)
            buffers.append(self._arranged(data))
        return buffers

    def _arranged(self, data: torch.Tensor) -> torch.Tensor:
        """The same elements with other strides."""
        n_slots, n_heads, head_dim = data.shape
        if self.arrangement == "heads first":
            arranged = data.new_zeros(n_heads, n_slots, head_dim).transpose(0, 1)
        elif self.arrangement == "k and v interleaved":
            arranged = data.new_zeros(n_slots, 2, n_heads, head_dim)[:, 1]
        elif self.arrangement == "channels apart":
            arranged = data.new_zeros(n_slots, n_heads, 2 * head_dim)[..., ::2]
        else:
            return data
        arranged.view(as_int(data)).copy_(data.view(as_int(data)))
        return arranged


def as_int(x: torch.Tensor) -> torch.dtype:
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()]


def shapes(*, lossy: bool, small: bool = False) -> st.SearchStrategy[Shape]:
    """Page sizes, heads, channels, types and strides that occur, and some that shouldn't.

    small: what the interpreter, ten milliseconds a program, can do in good time.
    """
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    if not lossy:
        dtypes += [torch.float8_e4m3fn, torch.uint8]
    most = 2 if small else 3
    dims = [3, 16, 20, 64] if small else [3, 16, 20, 64, 80, 128]
    latents = [9, 36] if small else [9, 36, 288]
    head_dims = st.one_of(
        st.tuples(st.sampled_from(dims)).map(lambda d: (d[0], d[0])),
        st.tuples(st.sampled_from(dims), st.sampled_from(dims)),
        st.tuples(st.sampled_from(latents)),
    )
    return st.builds(
        Shape,
        page_size=st.sampled_from([1, 3, 8, 16] if small else [1, 3, 8, 16, 64]),
        n_heads=st.integers(1, most),
        head_dims=head_dims,
        dtype=st.sampled_from(dtypes),
        n_layers=st.integers(1, most),
        arrangement=st.sampled_from(ARRANGEMENTS),
    )


#: Some pages of a pool, in any order, none twice.
page_lists = st.lists(st.integers(0, N_PAGES - 1), unique=True, max_size=N_PAGES)


def gathered(buffers: Sequence[torch.Tensor], layout: PageLayout, pages: list[int]) -> torch.Tensor:
    """The reference's rows; bytes that no section owns are 0."""
    rows = torch.zeros(len(pages), layout.page_bytes, dtype=torch.uint8)
    reference.gather(buffers, layout, pages, rows)
    return rows


def scattered(
    buffers: Sequence[torch.Tensor], layout: PageLayout, pages: list[int], rows: torch.Tensor
) -> list[torch.Tensor]:
    """What the pool holds after the reference has written to it."""
    copies = [buffer.clone() for buffer in buffers]
    reference.scatter(copies, layout, pages, rows)
    return copies


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(as_int(a)), b.contiguous().view(as_int(b))
    )
