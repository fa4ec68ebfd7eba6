"""The tightest first-token objective of late: who comes next may have it, and waits for a pass."""

from __future__ import annotations

import math
from collections import deque

#: An objective counts so long after somebody came with it: one that nobody has any more must not
#: keep passes short until the server is restarted.
MEMORY_S = 600.0


class TightestObjective:
    """The least of a sliding window, as a queue in which every later entry is looser."""

    def __init__(self) -> None:
        self._arrivals: deque[tuple[float, float]] = deque()

    def arrived(self, ttft_s: float | None, now_s: float) -> None:
        """Somebody came with this objective, None: with none. Who comes back counts as new."""
        if ttft_s is None:
            return
        arrivals = self._arrivals
        if arrivals:
            now_s = max(now_s, arrivals[-1][0])
        while arrivals and arrivals[-1][1] >= ttft_s:
            arrivals.pop()
        arrivals.append((now_s, ttft_s))

    def seconds(self, now_s: float) -> float:
        """Infinity if nobody had one."""
        arrivals = self._arrivals
        while arrivals and arrivals[0][0] < now_s - MEMORY_S:
            arrivals.popleft()
        return arrivals[0][1] if arrivals else math.inf
