"""Layouts: raw is the tiers' own, lossy ones are aligned and tight, and nothing needs torch."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from kernel.pools import Shape, shapes
from sgl_kernel_ext.formats import (
    SECTION_ALIGNMENT_BYTES,
    BufferSpec,
    Format,
    PageLayout,
    Role,
    boosted_channels,
)
from sgl_kernel_ext.ops import PagePool, gather_pages
from tiered_kv.tiers.device import CpuPageCopier, buffer_format

LOSSY = [f for f in Format if f.is_lossy]


@given(shapes(lossy=False))
@settings(deadline=None)
def test_raw_is_the_tiers_page_format(shape: Shape) -> None:
    buffers = shape.pool(0)
    layout = shape.layout(Format.RAW)
    page_format = buffer_format(shape.page_size, shape.layers, buffers)
    assert layout.page_bytes == page_format.page_bytes
    assert layout.n_layers == page_format.n_layers
    ours = [(b.spec.layer, b.offset, b.n_bytes) for b in layout.buffers]
    assert ours == [(s.layer, s.offset, s.n_bytes) for s in page_format.parts]


def test_raw_rows_are_what_the_tiers_copier_writes() -> None:
    shape = Shape(16, 2, (24, 16), torch.bfloat16, n_layers=3)
    buffers = shape.pool(0)
    layout = shape.layout(Format.RAW)
    host = np.zeros((4, layout.page_bytes + 5), dtype=np.uint8)
    copier = CpuPageCopier(16, shape.layers, buffers, host)
    slots = torch.cat([torch.arange(16) + 16 * page for page in (6, 2)])
    copier.to_host(slots, np.array([1, 3]), ())
    ours = torch.zeros(host.shape, dtype=torch.uint8)
    pool = PagePool(buffers, layout)
    gather_pages(pool, torch.tensor([6, 2]), ours, rows=torch.tensor([1, 3]))
    assert np.array_equal(ours.numpy(), host)
    assert host[1].any()


@pytest.mark.parametrize("format_", LOSSY)
@given(shape=shapes(lossy=True))
@settings(deadline=None)
def test_sections_are_aligned_in_order_and_tight(format_: Format, shape: Shape) -> None:
    layout = shape.layout(format_)
    end_of_share = 0
    for share in layout.buffers:
        assert share.offset == end_of_share
        end_of_share += share.n_bytes
        end = 0
        for section in share.sections:
            assert section.offset % SECTION_ALIGNMENT_BYTES == 0
            assert 0 <= section.offset - end < SECTION_ALIGNMENT_BYTES
            end = section.offset + section.n_bytes
        assert 0 <= share.n_bytes - end < SECTION_ALIGNMENT_BYTES
    assert layout.page_bytes == end_of_share
    ends = [layout.layer_bytes(range(i, i + 1)) for i in range(layout.n_layers)]
    assert ends[0][0] == 0
    assert ends[-1][1] == layout.page_bytes
    assert all(a[1] == b[0] for a, b in itertools.pairwise(ends))


@pytest.mark.parametrize(
    ("format_", "token_bytes"),
    # By hand: 32 layers of 8 heads of 128 channels, 64 tokens a page. int4: a key head has 64 x 64
    # bytes of codes and 128 x 2 of scales and of zero points, a value head 64 x 2 of each.
    [
        (Format.RAW, 131_072),
        (Format.FP8, 65_568),
        (Format.INT4, 35_840),
        (Format.INT2, 19_456),
        (Format.KITTY, 20_544),
    ],
)
def test_bytes_per_token_of_llama_8b(format_: Format, token_bytes: int) -> None:
    specs = [
        BufferSpec(layer, role, 8, 128, "bfloat16")
        for layer in range(32)
        for role in (Role.KEY, Role.VALUE)
    ]
    assert PageLayout.of(format_, 64, specs).token_bytes == token_bytes


@pytest.mark.parametrize("format_", LOSSY)
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_lossy_pages_are_smaller(format_: Format, page_size: int) -> None:
    shape = Shape(page_size, 8, (128, 128), torch.bfloat16)
    assert shape.layout(format_).page_bytes < 0.6 * shape.layout(Format.RAW).page_bytes


def test_an_eighth_of_the_channels_is_boosted() -> None:
    assert [boosted_channels(d) for d in (3, 64, 80, 128, 576)] == [3, 8, 8, 16, 72]


def test_fingerprints_tell_layouts_apart() -> None:
    spec = BufferSpec(0, Role.KEY, 2, 64, "bfloat16")
    layouts = [PageLayout.of(f, size, [spec]) for f in Format for size in (1, 16)]
    layouts.append(PageLayout.of(Format.FP8, 16, [BufferSpec(0, Role.KEY, 2, 64, "float16")]))
    layouts.append(PageLayout.of(Format.INT4, 16, [BufferSpec(0, Role.VALUE, 2, 64, "bfloat16")]))
    fingerprints = {layout.fingerprint() for layout in layouts}
    assert len(fingerprints) == len(layouts)
    assert PageLayout.of(Format.RAW, 1, [spec]).fingerprint() in fingerprints


def test_what_does_not_fit_is_refused() -> None:
    key = BufferSpec(0, Role.KEY, 2, 64, "bfloat16")
    later = BufferSpec(1, Role.KEY, 2, 64, "bfloat16")
    for order in ([later, key], [later], []):
        with pytest.raises(ValueError, match="layer by layer"):
            PageLayout.of(Format.RAW, 16, order)
    with pytest.raises(ValueError, match="at least 1"):
        PageLayout.of(Format.RAW, 0, [key])
    with pytest.raises(ValueError, match="use raw"):
        PageLayout.of(Format.FP8, 16, [BufferSpec(0, Role.KEY, 2, 64, "float8_e4m3fn")])
    with pytest.raises(ValueError, match="not supported"):
        BufferSpec(0, Role.KEY, 2, 64, "float64")
    with pytest.raises(ValueError, match="no elements"):
        BufferSpec(0, Role.KEY, 0, 64, "bfloat16")
    with pytest.raises(KeyError, match="codes"):
        PageLayout.of(Format.FP8, 16, [key]).buffers[0].section("mask")


def test_layouts_need_no_torch() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'triton', 'numpy'): sys.modules[name] = None\n"
        "import sgl_kernel_ext.formats as f\n"
        "spec = f.BufferSpec(0, f.Role.KEY, 1, 64, 'bfloat16')\n"
        "print(f.PageLayout.of(f.Format.KITTY, 64, [spec]).page_bytes)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 0
