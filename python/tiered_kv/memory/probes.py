"""When a link whose price keeps everybody away from it is tried again.

What nobody uses is not measured, so a price that was too high once (a disk that hung, a copy beside
which the machine was busy) would stay too high for ever. Now and then a few pages are moved
whatever they are believed to cost: rarely enough, and few enough, to be no cost of their own.
"""

from __future__ import annotations

#: A price is doubted when nothing was moved over the link for so long.
PROBE_EVERY_S = 3.0
#: So many pages, at most, are moved to find out.
PROBE_PAGES = 4


class Probes:
    """Of one link. `now_s`: the caller's clock, the same on every rank."""

    def __init__(self) -> None:
        self._due_s = PROBE_EVERY_S

    def is_due(self, now_s: float) -> bool:
        """Whether the price is to be doubted."""
        return now_s >= self._due_s

    def begun(self, now_s: float) -> None:
        """Something was moved over the link, or is about to be to find out."""
        self._due_s = now_s + PROBE_EVERY_S
