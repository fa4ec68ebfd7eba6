"""The virtual clock and the events on it, in the order of (time, sequence)."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from typing import TypeAlias

Handler: TypeAlias = Callable[[float], None]
"""Called with the time at which the event happens, in seconds."""


class EventQueue:
    """Events fire by time, and in the order of scheduling at equal times: runs can be repeated."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Handler]] = []
        self._sequence = itertools.count()
        self._cancelled: set[int] = set()
        self._now_s = 0.0

    def now(self) -> float:
        """Seconds since the start of the simulation; never decreases."""
        return self._now_s

    def __len__(self) -> int:
        return len(self._heap) - len(self._cancelled)

    def schedule(self, at_s: float, handler: Handler) -> int:
        """Call `handler` at `at_s`, or now if that is past; returns a number to cancel it with."""
        sequence = next(self._sequence)
        heapq.heappush(self._heap, (max(at_s, self._now_s), sequence, handler))
        return sequence

    def cancel(self, sequence: int) -> None:
        """The event, which must not have happened yet, will not."""
        self._cancelled.add(sequence)

    def fire_next(self) -> bool:
        """Advance to the next event and handle it; False if there is none."""
        while self._heap:
            at_s, sequence, handler = heapq.heappop(self._heap)
            if sequence in self._cancelled:
                self._cancelled.discard(sequence)
                continue
            self._now_s = at_s
            handler(at_s)
            return True
        return False
