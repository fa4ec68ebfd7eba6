"""Logical time: what policies order by, the same on every rank."""

from __future__ import annotations


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
