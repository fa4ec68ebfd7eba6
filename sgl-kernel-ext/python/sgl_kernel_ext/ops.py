"""The two ops: gather pages of a device pool into page-first rows, and scatter such rows back.

    pool = PagePool(buffers, PageLayout.of(Format.FP8, page_size, specs))
    gather_pages(pool, pages, out)                        # all layers, whole pages
    scatter_pages(pool, pages, rows_of_layer, layers=range(3, 4))   # a layer that has arrived

On CUDA they run as Triton kernels in the current stream and return at once; elsewhere as vectorised
torch. `reference` says, slowly, what they mean. Both convert between the pool's elements and the
layout's format on the way.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Protocol

import torch

from sgl_kernel_ext.formats import BufferSpec, Format, PageLayout, Role


class Backend(Protocol):
    """Carries out copies whose shapes are checked."""

    def gather(self, copy: PageCopy) -> None: ...

    def scatter(self, copy: PageCopy) -> None: ...


class PagePool:
    """A device pool's KV buffers with the layout that its pages get outside of it.

    buffers[i]: (slots, n_heads, head_dim) of any strides, as layout.buffers[i].spec says; page p is
    rows [p * page_size, (p + 1) * page_size). A tail of less than a page is never touched.
    backend: "torch", "triton", or "auto": Triton on CUDA, torch elsewhere.
    debug: check that indices lie in range and that no page is written twice. On an accelerator
    this waits for the indices.
    Raises ValueError if the buffers and the layout don't fit each other.
    """

    def __init__(
        self,
        buffers: Sequence[torch.Tensor],
        layout: PageLayout,
        *,
        backend: str = "auto",
        debug: bool = False,
    ) -> None:
        check_buffers(buffers, layout)
        self.buffers = tuple(buffers)
        self.layout = layout
        self.debug = debug
        self.device = buffers[0].device
        self.n_pages = min(b.shape[0] for b in buffers) // layout.page_size
        self.backend = make_backend(choose_backend(backend, self.device), self)


class PageCopy:
    """One checked call: pages of the pool, rows of page-first bytes, and the layers in them.

    data: (rows, bytes) of uint8, neighbouring bytes neighbours; column 0 is the first byte of
    the first layer.
    """

    __slots__ = ("data", "first_byte", "layers", "n_bytes", "pages", "rows")

    def __init__(
        self,
        pool: PagePool,
        pages: torch.Tensor,
        data: torch.Tensor,
        rows: torch.Tensor | None,
        layers: range | None,
    ) -> None:
        self.layers = range(pool.layout.n_layers) if layers is None else layers
        self.first_byte, end = pool.layout.layer_bytes(self.layers)
        self.n_bytes = end - self.first_byte
        self.pages = pages
        self.rows = rows
        self.data = data
        check_data(data, self.n_bytes, len(pages), rows)
        for name, index in (("pages", pages), ("rows", rows)):
            if index is not None:
                check_index(name, index, len(pages), pool.device)
        if pool.debug:
            check_range("pages", pages, pool.n_pages)
            if rows is not None:
                check_range("rows", rows, data.shape[0])


def gather_pages(
    pool: PagePool,
    pages: torch.Tensor,
    out: torch.Tensor,
    *,
    rows: torch.Tensor | None = None,
    layers: range | None = None,
) -> None:
    """Writes page pages[i] of the pool to row i of `out`, or to row rows[i].

    pages, rows: (n,) int64 on the pool's device.
    out: (at least n, at least the bytes of the layers) uint8; rows may be apart. On the pool's
    device, or pinned host memory, which a GPU's kernel then writes directly. Padding between
    sections is left as it is, or zeroed.
    layers: a run of layers, whose first byte goes to column 0; all of them by default.
    Raises ValueError if a shape doesn't fit; if pool.debug, IndexError for an index out of range.
    """
    copy = PageCopy(pool, pages, out, rows, layers)
    if pool.debug and rows is not None:
        check_unique("rows", rows)
    if len(pages):
        pool.backend.gather(copy)


def scatter_pages(
    pool: PagePool,
    pages: torch.Tensor,
    source: torch.Tensor,
    *,
    rows: torch.Tensor | None = None,
    layers: range | None = None,
) -> None:
    """Writes row i of `source`, or row rows[i], to page pages[i] of the pool.

    Shapes, `layers` and errors as in `gather_pages`; no page may be listed twice.
    """
    copy = PageCopy(pool, pages, source, rows, layers)
    if pool.debug:
        check_unique("pages", pages)
    if len(pages):
        pool.backend.scatter(copy)


def warm_up(pool: PagePool) -> None:
    """Compiles what later calls will run, which takes seconds a kernel; copies nothing.

    For rows that start at multiples of 16 bytes, as a host pool's do, picked by `rows` or not.
    """
    nothing = torch.empty(0, dtype=torch.int64, device=pool.device)
    data = torch.empty((1, pool.layout.page_bytes), dtype=torch.uint8, device=pool.device)
    for rows in (None, nothing):
        copy = PageCopy(pool, nothing, data, rows, None)
        pool.backend.gather(copy)
        pool.backend.scatter(copy)


def layout_of(
    format_: Format,
    page_size: int,
    buffers: Sequence[torch.Tensor],
    layers: Sequence[int],
    roles: Sequence[Role],
) -> PageLayout:
    """The layout of a pool's pages; buffers[i] is (slots, heads, head_dim) of layer layers[i]."""
    specs = [
        BufferSpec(layer, role, b.shape[1], b.shape[2], str(b.dtype).removeprefix("torch."))
        for b, layer, role in zip(buffers, layers, roles, strict=True)
    ]
    return PageLayout.of(format_, page_size, specs)


def choose_backend(name: str, device: torch.device) -> str:
    if name != "auto":
        return name
    has_triton = device.type == "cuda" and importlib.util.find_spec("triton") is not None
    return "triton" if has_triton else "torch"


def make_backend(name: str, pool: PagePool) -> Backend:
    if name == "torch":
        from sgl_kernel_ext.torch_backend import TorchBackend

        return TorchBackend(pool.buffers, pool.layout)
    if name == "triton":
        from sgl_kernel_ext.triton_backend import TritonBackend

        return TritonBackend(pool.buffers, pool.layout)
    raise ValueError(f"there is no backend {name!r}; choose auto, torch or triton")


def check_buffers(buffers: Sequence[torch.Tensor], layout: PageLayout) -> None:
    if len(buffers) != len(layout.buffers):
        raise ValueError(
            f"the layout has {len(layout.buffers)} buffers but {len(buffers)} were given; "
            "list every layer's"
        )
    for share, buffer in zip(layout.buffers, buffers, strict=True):
        spec = share.spec
        expected = (spec.n_heads, spec.head_dim)
        if buffer.ndim != 3 or tuple(buffer.shape[1:]) != expected:
            raise ValueError(
                f"a buffer of layer {spec.layer} has shape {tuple(buffer.shape)}; "
                f"the layout wants (slots, {spec.n_heads}, {spec.head_dim})"
            )
        if buffer.dtype != getattr(torch, spec.dtype) or buffer.device != buffers[0].device:
            raise ValueError(
                f"a buffer of layer {spec.layer} is {buffer.dtype} on {buffer.device}; the layout "
                f"wants {spec.dtype}, and all buffers on one device ({buffers[0].device})"
            )


def check_data(data: torch.Tensor, n_bytes: int, n_pages: int, rows: torch.Tensor | None) -> None:
    if data.dtype != torch.uint8 or data.ndim != 2 or (data.shape[1] > 1 and data.stride(1) != 1):
        raise ValueError(
            "page bytes must be a (rows, bytes) tensor of uint8 with neighbouring bytes; "
            f"this one is {tuple(data.shape)} of {data.dtype} with strides {data.stride()}"
        )
    if data.shape[1] < n_bytes or (rows is None and data.shape[0] < n_pages):
        raise ValueError(
            f"page bytes of shape {tuple(data.shape)} are too small for {n_pages} rows of "
            f"{n_bytes} bytes"
        )


def check_index(name: str, index: torch.Tensor, n_pages: int, device: torch.device) -> None:
    if index.shape != (n_pages,) or index.dtype != torch.int64 or index.device != device:
        raise ValueError(
            f"{name} must be ({n_pages},) of int64 on {device}; they are {tuple(index.shape)} of "
            f"{index.dtype} on {index.device}"
        )


def check_range(name: str, index: torch.Tensor, end: int) -> None:
    if len(index) and (int(index.min()) < 0 or int(index.max()) >= end):
        raise IndexError(
            f"{name} run from {int(index.min())} to {int(index.max())}; they must lie in [0, {end})"
        )


def check_unique(name: str, index: torch.Tensor) -> None:
    if len(torch.unique(index)) != len(index):
        raise IndexError(f"{name} lists something twice, and would write it twice; list it once")
