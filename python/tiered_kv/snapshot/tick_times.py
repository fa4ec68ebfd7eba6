"""When a logical tick was: the forest counts uses, people want to know how long ago they were."""

from __future__ import annotations

from bisect import bisect_left

#: Ticks are noted so often, at most.
EVERY_S = 1.0
#: Notes that are kept; where there are more, every other one goes, so old times become coarser.
NOTES_MAX = 2048


class TickTimes:
    """Notes of (tick, seconds), both growing."""

    def __init__(self) -> None:
        self._ticks: list[int] = []
        self._times_s: list[float] = []

    def note(self, tick: int, now_s: float) -> None:
        """It is `now_s`, and the last tick given out is `tick`."""
        times_s = self._times_s
        if times_s and (now_s - times_s[-1] < EVERY_S or self._ticks[-1] == tick):
            return
        self._ticks.append(tick)
        times_s.append(now_s)
        if len(times_s) > NOTES_MAX:
            del self._ticks[:-1:2], times_s[:-1:2]

    def age_s(self, tick: int, now_s: float) -> float:
        """How long before `now_s` the tick was, to within what was noted."""
        at = bisect_left(self._ticks, tick)
        return 0.0 if at >= len(self._ticks) else max(0.0, now_s - self._times_s[at])
