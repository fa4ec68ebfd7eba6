"""Clocks are passed in, so that policies run the same under real, virtual and logical time."""

from __future__ import annotations

from typing import Protocol


class Clock(Protocol):
    """A source of monotonic time."""

    def now(self) -> float:
        """Seconds since an arbitrary origin; never decreases."""
        ...


class LogicalClock:
    """Counts events instead of seconds.

    Recency is measured with it rather than with wall time because all tensor-parallel ranks see
    the same sequence of events, but not the same wall time, and must evict the same nodes.
    """

    __slots__ = ("_ticks",)

    def __init__(self) -> None:
        self._ticks = 0

    def now(self) -> int:
        """The last tick given out; 0 before the first."""
        return self._ticks

    def tick(self) -> int:
        """Advance by one and return the new value."""
        self._ticks += 1
        return self._ticks
