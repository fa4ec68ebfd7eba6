"""The vectorised torch path gives the reference's bytes, to the bit, in every format and shape."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel.pools import (
    N_PAGES,
    Shape,
    gathered,
    page_lists,
    same_bits,
    scattered,
    shapes,
)
from sgl_kernel_ext.formats import Format
from sgl_kernel_ext.ops import PagePool, gather_pages, scatter_pages, warm_up

pytestmark = pytest.mark.timeout(120)

LOSSY = [f for f in Format if f.is_lossy]


def check(shape: Shape, format_: Format, pages: list[int], seed: int) -> None:
    buffers = shape.pool(seed)
    pool = PagePool(buffers, shape.layout(format_), backend="torch", debug=True)
    index = torch.tensor(pages, dtype=torch.long)
    expected = gathered(buffers, pool.layout, pages)
    out = torch.zeros_like(expected)
    gather_pages(pool, index, out)
    assert torch.equal(out, expected)
    target = shape.pool(seed + 1)
    after = scattered(target, pool.layout, pages, expected)
    scatter_pages(PagePool(target, pool.layout, backend="torch", debug=True), index, expected)
    assert all(same_bits(a, b) for a, b in zip(target, after, strict=True))


@given(shapes(lossy=False), page_lists, st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_raw(shape: Shape, pages: list[int], seed: int) -> None:
    check(shape, Format.RAW, pages, seed)


@pytest.mark.parametrize("format_", LOSSY)
@given(shape=shapes(lossy=True), pages=page_lists, seed=st.integers(0, 99))
@settings(max_examples=12, deadline=None)
def test_lossy(format_: Format, shape: Shape, pages: list[int], seed: int) -> None:
    check(shape, format_, pages, seed)


@pytest.mark.parametrize("format_", Format)
def test_layers_arrive_one_by_one_in_rows_of_a_larger_pool(format_: Format) -> None:
    shape = Shape(16, 2, (64, 64), torch.bfloat16, n_layers=3)
    buffers = shape.pool(0)
    layout = shape.layout(format_)
    pool = PagePool(buffers, layout, backend="torch", debug=True)
    pages, rows = torch.tensor([5, 0, 3]), torch.tensor([8, 2, 4])
    host = torch.zeros(9, layout.page_bytes + 13, dtype=torch.uint8)
    host[[0, 1, 3, 5, 6, 7]] = 7
    gather_pages(pool, pages, host, rows=rows)
    assert torch.equal(host[rows, : layout.page_bytes], gathered(buffers, layout, [5, 0, 3]))
    assert (host[[0, 1, 3, 5, 6, 7]] == 7).all()
    assert (host[rows, layout.page_bytes :] == 0).all()
    target = shape.pool(1)
    arrived = PagePool(target, layout, backend="torch", debug=True)
    expected = scattered(target, layout, [6, 1, 2], host[rows, : layout.page_bytes])
    before = [buffer.clone() for buffer in target]
    to = torch.tensor([6, 1, 2])
    for layer in range(3):
        start, end = layout.layer_bytes(range(layer, layer + 1))
        layers = range(layer, layer + 1)
        scatter_pages(arrived, to, host[:, start:end], rows=rows, layers=layers)
        for i, buffer in enumerate(target):
            there = layout.buffers[i].spec.layer <= layer
            assert same_bits(buffer, expected[i] if there else before[i])


@pytest.mark.parametrize("format_", Format)
def test_far_elements_and_equal_ones_are_the_references_too(format_: Format) -> None:
    shape = Shape(16, 2, (64,), torch.float32, n_layers=1)
    (x,) = shape.pool(0)
    x[3, 0, 4], x[2, 0, 7], x[5, 1, 2], x[:16, 1, 9] = 3e38, -3e38, 1e-40, 2.5
    layout = shape.layout(format_)
    expected = gathered([x], layout, [0])
    out = torch.zeros_like(expected)
    pool = PagePool([x], layout, backend="torch")
    gather_pages(pool, torch.tensor([0]), out)
    assert torch.equal(out, expected)
    (after,) = scattered([x], layout, [1], expected)
    scatter_pages(pool, torch.tensor([1]), out)
    assert same_bits(x, after)


def test_warming_up_changes_nothing() -> None:
    shape = Shape(4, 1, (8, 8), torch.bfloat16)
    buffers = shape.pool(0)
    warm_up(PagePool(buffers, shape.layout(Format.KITTY)))
    assert all(same_bits(a, b) for a, b in zip(buffers, shape.pool(0), strict=True))


def test_indices_are_checked_in_debug() -> None:
    shape = Shape(4, 1, (8, 8), torch.bfloat16)
    layout = shape.layout(Format.RAW)
    pool = PagePool(shape.pool(0), layout, debug=True)
    out = torch.zeros(4, layout.page_bytes, dtype=torch.uint8)
    for wrong in (-1, N_PAGES):
        with pytest.raises(IndexError, match="pages run from"):
            gather_pages(pool, torch.tensor([0, wrong]), out)
    with pytest.raises(IndexError, match="rows run from"):
        gather_pages(pool, torch.tensor([0]), out, rows=torch.tensor([4]))
    with pytest.raises(IndexError, match="twice"):
        scatter_pages(pool, torch.tensor([2, 2]), out)
    with pytest.raises(IndexError, match="twice"):
        gather_pages(pool, torch.tensor([2, 3]), out, rows=torch.tensor([1, 1]))


def test_wrong_shapes_are_refused() -> None:
    shape = Shape(4, 1, (8, 8), torch.bfloat16)
    layout = shape.layout(Format.RAW)
    pool = PagePool(shape.pool(0), layout)
    out = torch.zeros(2, layout.page_bytes, dtype=torch.uint8)
    with pytest.raises(ValueError, match="too small for 3 rows"):
        gather_pages(pool, torch.tensor([0, 1, 2]), out)
    with pytest.raises(ValueError, match="too small"):
        gather_pages(pool, torch.tensor([0]), out[:, 1:])
    with pytest.raises(ValueError, match="neighbouring bytes"):
        gather_pages(pool, torch.tensor([0]), out.repeat(1, 2)[:, ::2])
    with pytest.raises(ValueError, match="pages must be"):
        gather_pages(pool, torch.tensor([0], dtype=torch.int32), out)
    with pytest.raises(ValueError, match="no run of this page's 2 layers"):
        gather_pages(pool, torch.tensor([0]), out, layers=range(1, 3))
    with pytest.raises(ValueError, match="list every layer's"):
        PagePool(shape.pool(0)[:3], layout)
    with pytest.raises(ValueError, match="the layout wants"):
        PagePool(Shape(4, 1, (9, 8), torch.bfloat16).pool(0), layout)
    with pytest.raises(ValueError, match="no backend"):
        PagePool(shape.pool(0), layout, backend="cuda")
