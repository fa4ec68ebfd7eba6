"""The byte layout of a page: offsets, order, alignment, and what its fingerprint tells apart."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiered_kv.tiers import page_format as page_format_module
from tiered_kv.tiers.alignment import ALIGNMENT_BYTES, round_up
from tiered_kv.tiers.page_format import PageFormat

pytestmark = pytest.mark.timeout(30)

MHA = PageFormat.of_buffers(16, [0, 0, 1, 1], [192, 192, 192, 192])


def test_segments_lie_back_to_back_layer_by_layer() -> None:
    page = PageFormat.of_buffers(4, [0, 0, 1, 1], [8, 16, 8, 16])
    assert [(s.layer, s.offset, s.n_bytes) for s in page.parts] == [
        (0, 0, 32),
        (0, 32, 64),
        (1, 96, 32),
        (1, 128, 64),
    ]
    assert page.page_bytes == 192
    assert page.n_layers == 2


@given(
    st.integers(1, 128),
    st.lists(st.lists(st.integers(1, 300), min_size=1, max_size=3), min_size=1, max_size=5),
)
def test_the_segments_cover_the_page_exactly(page_size: int, layers: list[list[int]]) -> None:
    numbers = [number for number, buffers in enumerate(layers) for _ in buffers]
    sizes = [size for buffers in layers for size in buffers]
    page = PageFormat.of_buffers(page_size, numbers, sizes)
    end = 0
    for segment, size in zip(page.parts, sizes, strict=True):
        assert segment.offset == end
        assert segment.n_bytes == size * page_size
        end += segment.n_bytes
    assert page.page_bytes == end == sum(sizes) * page_size
    assert page.n_layers == len(layers)
    assert page.slot_bytes % ALIGNMENT_BYTES == 0
    assert 0 <= page.slot_bytes - page.page_bytes < ALIGNMENT_BYTES


def test_buffers_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match="layer by layer"):
        PageFormat.of_buffers(4, [0, 1, 0, 1], [8, 8, 8, 8])


def test_a_layer_too_few_is_refused() -> None:
    with pytest.raises(ValueError, match="argument 2 is longer"):
        PageFormat.of_buffers(4, [0], [8, 8])


@pytest.mark.parametrize(
    ("page_size", "layers", "sizes"),
    [
        (32, [0, 0, 1, 1], [192, 192, 192, 192]),  # other page size
        (16, [0, 0, 1, 1], [96, 96, 96, 96]),  # half as wide a dtype
        (16, [0, 0, 0, 0], [192, 192, 192, 192]),  # other layers
        (16, [0, 0, 1, 1], [96, 288, 192, 192]),  # same total, other split
        (16, [0, 1], [384, 384]),  # K and V in one buffer
        (8, [0, 0, 1, 1], [384, 384, 384, 384]),  # same bytes per page, fewer tokens
    ],
)
def test_the_fingerprint_differs(page_size: int, layers: list[int], sizes: list[int]) -> None:
    assert PageFormat.of_buffers(page_size, layers, sizes).fingerprint() != MHA.fingerprint()


def test_the_fingerprint_is_stable() -> None:
    """It is part of names on disk: a change must come with a new LAYOUT_VERSION."""
    same = PageFormat.of_buffers(16, [0, 0, 1, 1], [192, 192, 192, 192])
    assert MHA.fingerprint() == same.fingerprint()
    assert len(MHA.fingerprint()) == 32
    assert MHA.fingerprint().hex()[:16] == "bc0eb7bdd5d5b71a"


def test_the_fingerprint_differs_between_layout_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    before = MHA.fingerprint()
    monkeypatch.setattr(page_format_module, "LAYOUT_VERSION", 2)
    assert MHA.fingerprint() != before


def test_round_up() -> None:
    rounded = {0: 0, 1: 4096, 4095: 4096, 4096: 4096, 4097: 8192}
    assert {n_bytes: round_up(n_bytes) for n_bytes in rounded} == rounded
