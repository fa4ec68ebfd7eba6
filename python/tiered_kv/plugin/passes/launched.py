"""From when to when each forward pass ran, whether or not launching it is running it."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

T = TypeVar("T")

#: Launched passes whose result is still to come; overlap has two at most.
LAUNCHED_MAX = 8


class LaunchedPasses(ABC, Generic[T]):
    """Notes what a pass does when it is launched, since its batch changes, until it is over.

    synchronous: whether `run_batch` returns when the pass is over, as it does on a CPU. Elsewhere
    passes run one after the other on the device, and the result of one is handled when it is there:
    a pass took the time since its launch, or since the result before, whichever was later.
    """

    def __init__(self, *, synchronous: bool) -> None:
        self._synchronous = synchronous
        self._launched: dict[float, T] = {}
        self._last_result_at = 0.0

    @abstractmethod
    def describe(self, batch: Any) -> T | None:
        """What the pass over `batch` does; None if nobody wants to know."""

    @abstractmethod
    def over(self, described: T, start_s: float, end_s: float) -> None:
        """Such a pass ran from `start_s` to `end_s` (time.monotonic)."""

    def launched(self, batch: Any) -> None:
        described = self.describe(batch)
        if described is None:
            return
        if self._synchronous:
            self.over(described, batch.launch_ts, time.monotonic())
            return
        self._launched[batch.launch_ts] = described
        while len(self._launched) > LAUNCHED_MAX:
            del self._launched[next(iter(self._launched))]

    def finished(self, batch: Any) -> None:
        if self._synchronous:
            return
        now = time.monotonic()
        described = self._launched.pop(batch.launch_ts, None)
        if described is not None:
            self.over(described, max(batch.launch_ts, self._last_result_at), now)
        self._last_result_at = now
