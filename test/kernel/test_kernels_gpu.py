"""The compiled kernels on a GPU give the reference's bytes and elements, to the bit.

Skipped where there is none. What the interpreter can't show is tested here: the compiler's own
arithmetic, streams, and rows in pinned host memory.
"""

from __future__ import annotations

import pytest
import torch

from kernel.pools import Shape, gathered, same_bits, scattered
from sgl_kernel_ext.formats import Format
from sgl_kernel_ext.ops import PagePool, gather_pages, scatter_pages, warm_up

DEVICE = "cuda"
pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

SHAPES = {
    "GQA": Shape(64, 8, (128, 128), torch.bfloat16),
    "GQA of float16, pages of 16": Shape(16, 8, (64, 64), torch.float16),
    "MLA": Shape(64, 1, (576,), torch.bfloat16),
    "single tokens": Shape(1, 2, (128, 128), torch.bfloat16),
    "wide keys": Shape(16, 3, (192, 128), torch.bfloat16),
    "odd channels": Shape(16, 3, (20, 3), torch.float32),
    "heads first": Shape(16, 4, (128, 128), torch.bfloat16, arrangement="heads first"),
    "interleaved": Shape(16, 4, (128, 128), torch.bfloat16, arrangement="k and v interleaved"),
    "channels apart": Shape(16, 2, (64, 64), torch.float32, arrangement="channels apart"),
}


def on_device(buffers: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same buffers with the same strides on the GPU."""
    moved = []
    for buffer in buffers:
        copy = torch.empty_strided(buffer.shape, buffer.stride(), dtype=buffer.dtype, device=DEVICE)
        moved.append(copy.copy_(buffer))
    return moved


def rows_of(n_rows: int, n_bytes: int, *, pinned: bool) -> torch.Tensor:
    """Zeroed rows whose starts are multiples of 64 bytes."""
    width = -(-n_bytes // 64) * 64
    if pinned:
        return torch.zeros(n_rows, width, dtype=torch.uint8, pin_memory=True)[:, :n_bytes]
    return torch.zeros(n_rows, width, dtype=torch.uint8, device=DEVICE)[:, :n_bytes]


@pytest.mark.parametrize("format_", Format)
@pytest.mark.parametrize("pinned", [False, True], ids=["on the device", "pinned"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_there_and_back(shape: Shape, format_: Format, pinned: bool) -> None:
    layout = shape.layout(format_)
    buffers, target = shape.pool(0), shape.pool(1)
    pages = [5, 0, 3]
    expected = gathered(buffers, layout, pages)
    out = rows_of(3, layout.page_bytes, pinned=pinned)
    # Indices at an odd place, as slices of a longer list are.
    index = torch.tensor([9, *pages], device=DEVICE)[1:]
    gather_pages(PagePool(on_device(buffers), layout, debug=True), index, out)
    torch.accelerator.synchronize()
    assert torch.equal(out.cpu(), expected)
    there = on_device(target)
    scatter_pages(PagePool(there, layout, debug=True), index, out)
    after = scattered(target, layout, pages, expected)
    assert all(same_bits(a.cpu(), b) for a, b in zip(there, after, strict=True))


@pytest.mark.parametrize("format_", Format)
def test_layers_into_rows_of_a_pinned_pool_in_a_stream_of_its_own(format_: Format) -> None:
    shape = SHAPES["GQA"]
    layout = shape.layout(format_)
    buffers, target = shape.pool(0), shape.pool(1)
    pool, back = PagePool(on_device(buffers), layout), PagePool(on_device(target), layout)
    warm_up(pool)
    host = rows_of(6, layout.page_bytes, pinned=True)
    pages, rows = torch.tensor([5, 0], device=DEVICE), torch.tensor([4, 1], device=DEVICE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gather_pages(pool, pages, host, rows=rows)
        for layer in range(layout.n_layers):
            layers = range(layer, layer + 1)
            start, end = layout.layer_bytes(layers)
            scatter_pages(back, pages, host[:, start:end], rows=rows, layers=layers)
    stream.synchronize()
    expected = gathered(buffers, layout, [5, 0])
    assert torch.equal(host[[4, 1]], expected)
    assert not host[[0, 2, 3, 5]].any()
    after = scattered(target, layout, [5, 0], expected)
    assert all(same_bits(a.cpu(), b) for a, b in zip(back.buffers, after, strict=True))
