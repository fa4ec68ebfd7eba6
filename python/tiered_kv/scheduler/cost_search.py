"""How much fits into some time, with few questions to the cost model."""

from __future__ import annotations

from collections.abc import Callable


def most_within(
    cost_s: Callable[[int], float], seconds: float, high: int, low_s: float, high_s: float
) -> int:
    """The largest of 0 <= n < `high` with `cost_s(n) <= seconds`; 0 is not asked about.

    cost_s: grows with n, and is asked about 0 < n < high. low_s: about what 0 costs. high_s: what
    `high` does, more than `seconds`. Costs are nearly linear in what is computed, so the place is
    guessed; every third time the middle is tried, which bounds it to 3 log2(high) questions.
    """
    low, tries = 0, 0
    while high - low > 1:
        tries += 1
        if tries % 3 and high_s > low_s:
            share = (seconds - low_s) / (high_s - low_s)
            at = min(max(low + int(share * (high - low)), low + 1), high - 1)
        else:
            at = (low + high) // 2
        at_s = cost_s(at)
        if at_s <= seconds:
            low, low_s = at, at_s
        else:
            high, high_s = at, at_s
    return low
