"""The reference itself: what comes back differs from what went in by no more than a format's step.

Everything else is compared with the reference, so this is where the formats are held to what they
promise. Bounds are derived from the elements, not from the code's scales.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel.pools import Shape
from sgl_kernel_ext.formats import BufferLayout, Format, Role, boosted_channels
from sgl_kernel_ext.ops import layout_of
from sgl_kernel_ext.reference import decode, encode, section_view, unpack
from sgl_kernel_ext.torch_codec import e4m3_decode

#: Rounding a number to float16 moves it by at most this part of it.
HALF = 2.0**-11


def share_of(x: torch.Tensor, format_: Format, role: Role) -> BufferLayout:
    return layout_of(format_, x.shape[0], [x], [0], [role]).buffers[0]


def there_and_back(x: torch.Tensor, format_: Format, role: Role = Role.KEY) -> torch.Tensor:
    share = share_of(x, format_, role)
    return decode(encode(x, share, format_), share, format_, x.shape[0])


pages = st.builds(
    lambda tokens, heads, channels, seed: Shape(
        tokens, heads, (channels,), torch.float32, n_layers=1
    ).pool(seed)[0][:tokens],
    st.sampled_from([1, 3, 8, 16]),
    st.integers(1, 2),
    st.sampled_from([3, 16, 20, 64]),
    st.integers(0, 999),
)


@given(pages)
@settings(max_examples=40, deadline=None)
def test_fp8_keeps_three_bits_after_the_leading_one(x: torch.Tensor) -> None:
    error = (there_and_back(x, Format.FP8) - x).abs()
    largest = x.abs().amax((0, 2), keepdim=True)
    smallest_step = largest / 448 * 2.0**-9
    assert (error <= torch.maximum(x.abs() * 2.0**-4, smallest_step / 2) * 1.001).all()


@pytest.mark.parametrize(("format_", "steps"), [(Format.INT4, 15), (Format.INT2, 3)])
@pytest.mark.parametrize("role", Role)
@given(x=pages)
@settings(max_examples=25, deadline=None)
def test_codes_are_half_a_step_off_at_most(
    format_: Format, steps: int, role: Role, x: torch.Tensor
) -> None:
    axis = 0 if role is Role.KEY and x.shape[0] >= 8 else 2
    assert_within(x, there_and_back(x, format_, role), axis, torch.tensor(steps))


def assert_within(x: torch.Tensor, y: torch.Tensor, axis: int, steps: torch.Tensor) -> None:
    """Half a step, and what rounding zero point and scale to float16 adds."""
    low, high = x.amin(axis, keepdim=True), x.amax(axis, keepdim=True)
    spread = high - low
    bound = spread / steps / 2 + (low.abs() + 2 * spread) * HALF + 1e-6
    assert ((y - x).abs() <= bound).all()


@given(pages.filter(lambda x: x.shape[0] >= 8))
@settings(max_examples=25, deadline=None)
def test_kitty_gives_the_widest_channels_four_bits(x: torch.Tensor) -> None:
    share = share_of(x, Format.KITTY, Role.KEY)
    data = encode(x, share, Format.KITTY)
    mask = section_view(data, share, "boosted")
    boosted = unpack(mask, 1, x.shape[2]).bool()
    assert (boosted.sum(1) == boosted_channels(x.shape[2])).all()
    spread = x.amax(0) - x.amin(0)
    for head in range(x.shape[1]):
        others = spread[head][~boosted[head]]
        # Ranges are taken above the zero point as it is stored, rounded to float16.
        slack = 2 * HALF * x[:, head].abs().max()
        assert len(others) == 0 or spread[head][boosted[head]].min() >= others.max() - slack
    steps = torch.where(boosted, 15, 3)
    assert_within(x, decode(data, share, Format.KITTY, x.shape[0]), 0, steps)


def test_kitty_is_nearer_than_int2_where_channels_stand_out() -> None:
    x = torch.randn(64, 2, 64, generator=torch.Generator().manual_seed(0))
    x[:, :, 5::16] *= 20
    squared = {f: (there_and_back(x, f) - x).square().mean() for f in (Format.INT2, Format.KITTY)}
    assert squared[Format.KITTY] < squared[Format.INT2] / 10


@pytest.mark.parametrize("format_", Format)
@pytest.mark.parametrize("value", [0.0, -2.5, 1000.0])
def test_equal_elements_come_back(format_: Format, value: float) -> None:
    x = torch.full((16, 2, 16), value)
    assert torch.allclose(there_and_back(x, format_), x, rtol=1e-6, atol=0)


@pytest.mark.parametrize("format_", Format)
def test_far_elements_stay_finite(format_: Format) -> None:
    """Beyond float16 an element may be far off; but it is a number, and its neighbours too."""
    x = torch.randn(16, 1, 16, generator=torch.Generator().manual_seed(0))
    x[3, 0, 4] = 3e38
    x[2, 0, 7] = -3e38
    x[5, 0, 2] = 1e-40
    assert there_and_back(x, format_).isfinite().all()


def test_every_e4m3_code_is_decoded() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F]  # those two are NaN
    assert torch.equal(e4m3_decode(codes), codes.view(torch.float8_e4m3fn).float())
