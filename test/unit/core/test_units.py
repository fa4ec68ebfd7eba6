"""Sizes as people write them: examples, and a round trip that must not lose more than it shows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiered_kv.core.errors import ConfigError
from tiered_kv.core.units import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("0", 0),
        ("1024", 1024),
        ("17 b", 17),
        ("8GB", 8 * 10**9),
        ("8g", 8 * 10**9),
        ("512MiB", 512 * 2**20),
        (" 1.5 KiB ", 1536),
        (".5k", 500),
        ("2TiB", 2 * 2**40),
        ("9007199254740993", 9007199254740993),
        (4096, 4096),
        (1e9, 10**9),
    ],
)
def test_parses(text: str | int | float, n_bytes: int) -> None:
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize(
    "text", ["", "GB", "-1", "8 GBs", "1e9", "1,000", "8 G B", -1, float("nan"), float("inf"), True]
)
def test_refuses_with_one_sentence(text: str | int | float) -> None:
    with pytest.raises(ConfigError) as error:
        parse_bytes(text)
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (2**20 - 1, "1 MiB"),
        (3 * 2**30, "3 GiB"),
        (5000 * 2**40, "5000 TiB"),
        (-2048, "-2 KiB"),
    ],
)
def test_formats(n_bytes: int, text: str) -> None:
    assert format_bytes(n_bytes) == text


@given(st.integers(min_value=0, max_value=2**50))
def test_what_is_shown_parses_back_to_within_its_last_digit(n_bytes: int) -> None:
    shown = format_bytes(n_bytes)
    last_digit = 0.05 * parse_bytes("1 " + shown.split()[1])
    assert abs(parse_bytes(shown) - n_bytes) <= last_digit + 1
