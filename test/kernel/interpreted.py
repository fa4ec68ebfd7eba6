"""The Triton kernels, run by Triton's interpreter, give the reference's bytes in every shape.

Not collected by itself: `test_interpreter.py` runs it in a process that interprets. Bytes of pages
must be equal. So must elements that come back, but for bfloat16, to which the interpreter
truncates: one step is allowed.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kernel.pools import (
    N_PAGES,
    Shape,
    as_int,
    gathered,
    same_bits,
    scattered,
    shapes,
)
from sgl_kernel_ext.formats import Format, Role
from sgl_kernel_ext.ops import PagePool, gather_pages, layout_of, scatter_pages, warm_up
from sgl_kernel_ext.triton_backend import TritonBackend
from sgl_kernel_ext.triton_plan import Buffers, plan_launch

pytestmark = pytest.mark.timeout(600)

#: A failure says its example at once; to shrink it takes minutes here.
NO_SHRINKING = [Phase.explicit, Phase.reuse, Phase.generate]
LOSSY = [f for f in Format if f.is_lossy]
few_pages = st.lists(st.integers(0, N_PAGES - 1), unique=True, max_size=2)


def within_a_step(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, or in bfloat16 neighbours: the patterns of one sign are ordered as their numbers."""
    if a.dtype != torch.bfloat16:
        return same_bits(a, b)
    bits_a, bits_b = (x.contiguous().view(as_int(x)).int() for x in (a, b))
    return bool(((bits_a - bits_b).abs() <= 1).all())


def check(shape: Shape, format_: Format, pages: list[int], seed: int) -> None:
    buffers = shape.pool(seed)
    layout = shape.layout(format_)
    pool = PagePool(buffers, layout, backend="triton", debug=True)
    index = torch.tensor(pages, dtype=torch.long)
    expected = gathered(buffers, layout, pages)
    out = aligned_rows(*expected.shape)
    gather_pages(pool, index, out)
    assert torch.equal(out, expected)
    target = shape.pool(seed + 1)
    after = scattered(target, layout, pages, expected)
    scatter_pages(PagePool(target, layout, backend="triton", debug=True), index, out)
    near = same_bits if format_ is Format.RAW else within_a_step
    assert all(near(a, b) for a, b in zip(target, after, strict=True))


def aligned_rows(n_rows: int, n_bytes: int) -> torch.Tensor:
    """Zeroed rows, each of which starts on a boundary as a host pool's slots do."""
    return torch.zeros(n_rows, -(-n_bytes // 64) * 64, dtype=torch.uint8)[:, :n_bytes]


@given(shapes(lossy=False, small=True), few_pages, st.integers(0, 99))
@settings(max_examples=12, deadline=None, phases=NO_SHRINKING)
def test_raw(shape: Shape, pages: list[int], seed: int) -> None:
    check(shape, Format.RAW, pages, seed)


@pytest.mark.parametrize("format_", LOSSY)
@given(shape=shapes(lossy=True, small=True), pages=few_pages, seed=st.integers(0, 99))
@settings(max_examples=8, deadline=None, phases=NO_SHRINKING)
def test_lossy(format_: Format, shape: Shape, pages: list[int], seed: int) -> None:
    check(shape, format_, pages, seed)


@pytest.mark.parametrize("format_", LOSSY)
def test_a_head_of_several_tiles(format_: Format) -> None:
    shape = Shape(16, 1, (520,), torch.float32, n_layers=1)
    launch = plan_launch(
        Buffers(format_, 16, shape.layout(format_).buffers[0].spec, (520, 520, 1), 16),
        to_pool=False,
        has_rows=False,
        data_align=16,
    )
    assert launch.constants["BLOCK_TOKENS"] < shape.page_size
    check(shape, format_, [4], 0)


@pytest.mark.parametrize("format_", Format)
def test_rows_and_layers(format_: Format) -> None:
    shape = Shape(8, 1, (16, 24), torch.float32, n_layers=3)
    buffers, target = shape.pool(0), shape.pool(1)
    layout = shape.layout(format_)
    pages, rows = torch.tensor([5, 0]), torch.tensor([3, 1])
    host = aligned_rows(4, layout.page_bytes)
    gather_pages(PagePool(buffers, layout, backend="triton"), pages, host, rows=rows)
    assert torch.equal(host[rows], gathered(buffers, layout, [5, 0]))
    assert not host[[0, 2]].any()
    start, end = layout.layer_bytes(range(1, 3))
    after = scattered(target, layout, [2, 6], host[rows])
    kept = [buffer.clone() for buffer in target[:2]]
    scatter_pages(
        PagePool(target, layout, backend="triton"),
        torch.tensor([2, 6]),
        host[:, start:end],
        rows=rows,
        layers=range(1, 3),
    )
    assert all(same_bits(a, b) for a, b in zip(target, kept + after[2:], strict=True))


def test_e4m3_at_every_boundary_between_codes() -> None:
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (codes[1:] + codes[:-1]) / 2
    beside = [torch.nextafter(middles, torch.tensor(to)) for to in (-1.0, 1000.0)]
    numbers = torch.cat([codes, middles, *beside])
    numbers = torch.cat([numbers, -numbers])
    x = torch.zeros(16, 1, 64)
    x.flatten()[: len(numbers)] = numbers  # the largest is 448, so the scale is 1
    layout = layout_of(Format.FP8, 16, [x], [0], [Role.KEY])
    out, back = aligned_rows(1, layout.page_bytes), torch.ones_like(x)
    gather_pages(PagePool([x], layout, backend="triton"), torch.tensor([0]), out)
    assert torch.equal(out[0, :1024], x.flatten().to(torch.float8_e4m3fn).view(torch.uint8))
    scatter_pages(PagePool([back], layout, backend="triton"), torch.tensor([0]), out)
    assert torch.equal(back, x.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("format_", Format)
def test_warming_up_changes_nothing(format_: Format) -> None:
    shape = Shape(8, 1, (16, 24), torch.float32)
    buffers = shape.pool(0)
    warm_up(PagePool(buffers, shape.layout(format_), backend="triton", debug=True))
    assert all(same_bits(a, b) for a, b in zip(buffers, shape.pool(0), strict=True))


@pytest.mark.parametrize(("format_", "launches"), [("raw", 1), ("fp8", 1), ("int4", 2)])
def test_keys_and_values_share_a_launch_where_they_are_alike(format_: str, launches: int) -> None:
    shape = Shape(8, 1, (16, 16), torch.float32, n_layers=3)
    backend = TritonBackend(shape.pool(0), shape.layout(Format(format_)))
    assert len(backend.groups) == launches
    assert sum(len(group.layers) for group in backend.groups) == 6


def test_raw_bytes_at_any_address() -> None:
    shape = Shape(4, 1, (8, 8), torch.float32)
    layout = shape.layout(Format.RAW)
    buffers = shape.pool(0)
    for shift in (1, 2, 4):
        out = torch.zeros(2, layout.page_bytes + shift, dtype=torch.uint8)[:, shift:]
        gather_pages(PagePool(buffers, layout, backend="triton"), torch.tensor([1, 3]), out)
        assert torch.equal(out, gathered(buffers, layout, [1, 3]))


def test_lossy_pages_at_an_odd_address_are_refused() -> None:
    shape = Shape(4, 1, (8, 8), torch.float32)
    layout = shape.layout(Format.FP8)
    out = torch.zeros(1, layout.page_bytes + 4, dtype=torch.uint8)[:, 4:]
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        gather_pages(PagePool(shape.pool(0), layout, backend="triton"), torch.tensor([1]), out)


@pytest.mark.long
@pytest.mark.parametrize("format_", Format)
@given(data=st.data())
@settings(max_examples=25, deadline=None, phases=NO_SHRINKING)
def test_more_shapes(format_: Format, data: st.DataObject) -> None:
    shape = data.draw(shapes(lossy=format_.is_lossy))
    check(shape, format_, data.draw(few_pages), data.draw(st.integers(0, 99)))
