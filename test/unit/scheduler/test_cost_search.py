"""The largest that fits, found with few questions, whatever shape costs have."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from tiered_kv.scheduler.cost_search import most_within

HIGH = 128
SHAPES: dict[str, Callable[[int], float]] = {
    "linear": lambda n: 0.5 + n,
    "flat, then linear": lambda n: max(40.0, float(n)),
    "square": lambda n: float(n * n),
    "steps": lambda n: float(n // 10),
    "a cliff": lambda n: 0.0 if n < 100 else 1e9,
    "root": math.sqrt,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_largest_that_fits(shape: str) -> None:
    cost_s = SHAPES[shape]
    for share in range(100):
        seconds = cost_s(HIGH) * share / 100
        asked: list[int] = []

        def noted(n: int, asked: list[int] = asked) -> float:
            asked.append(n)
            return cost_s(n)

        if cost_s(HIGH) <= seconds:
            continue
        found = most_within(noted, seconds, HIGH, cost_s(0), cost_s(HIGH))
        assert found == max((n for n in range(1, HIGH) if cost_s(n) <= seconds), default=0)
        assert len(asked) <= 3 * math.log2(HIGH)
        assert all(0 < n < HIGH for n in asked)
        if shape == "linear":
            assert len(asked) <= 3
