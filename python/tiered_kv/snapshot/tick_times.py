"""When a logical tick was: the forest counts uses, people want to know how long ago they were."""

from __future__ import annotations

from bisect import bisect_left

#: Ticks are noted so often, at most.
EVERY_S = 1.0
#: Notes that are kept. Where there are more, old times become coarser: to within this of their age.
NOTES_MAX = 2048
COARSE = 0.01


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
            self._thin_out(now_s)

    def _thin_out(self, now_s: float) -> None:
        """Some hundred are left of each power of ten of seconds, so this is done rarely."""
        kept: list[tuple[int, float]] = []
        for tick, at_s in zip(self._ticks, self._times_s, strict=True):
            if not kept or at_s - kept[-1][1] >= COARSE * (now_s - at_s):
                kept.append((tick, at_s))
        self._ticks = [tick for tick, _ in kept]
        self._times_s = [at_s for _, at_s in kept]

    def age_s(self, tick: int, now_s: float) -> float:
        """How long before `now_s` the tick was, to within what was noted."""
        at = bisect_left(self._ticks, tick)
        return 0.0 if at >= len(self._ticks) else max(0.0, now_s - self._times_s[at])
