"""When something that failed is tried again: after a while, twice as long after each failure.

By time, not by how often it was wanted: a quiet server would leave out what works again for hours,
a busy one would not leave it out at all.
"""

from __future__ import annotations

FIRST_S = 0.25
LONGEST_S = 8.0


class BackOff:
    """Of one thing. `now_s`: the caller's clock, the same on every rank."""

    def __init__(self) -> None:
        self._rest_s = 0.0
        self._until_s = 0.0

    @property
    def is_well(self) -> bool:
        """Whether it worked the last time."""
        return not self._rest_s

    def is_over(self, now_s: float) -> bool:
        """Whether it may be tried."""
        return now_s >= self._until_s

    def failed(self, now_s: float) -> None:
        """It was tried, in vain."""
        self._rest_s = min(max(FIRST_S, 2 * self._rest_s), LONGEST_S)
        self._until_s = now_s + self._rest_s

    def worked(self) -> None:
        """It was tried, and is as good as new."""
        self._rest_s = self._until_s = 0.0
