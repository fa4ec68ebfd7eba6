"""Logical time in epochs, so that a segment can count its pages by age as they come and go.

What a segment is worth depends on when each of its pages was used last. Nobody can look at ten
million pages to choose a segment, and the mean says little: one page that nobody has asked for in a
week would outweigh ten that are asked for all day. So each segment counts its pages by the epoch of
their last use.
"""

from __future__ import annotations

import bisect

import numpy as np
import numpy.typing as npt

EPOCHS = 16
"""Told apart; all before them count as one, the last of the counts."""
N_COUNTS = EPOCHS + 1
_BEFORE = EPOCHS


class Ages:
    """When the latest epochs began. Guarded by the catalog's lock."""

    def __init__(self) -> None:
        self._starts = [0]
        """Logical times, ascending, of the epochs that are told apart."""
        self._newest = 0
        """Where the newest epoch is counted; those before it are counted before it, round."""

    def place(self, time: int) -> int:
        """Which count a page belongs to that was used last at this logical time."""
        if time >= self._starts[-1]:
            return self._newest
        back = len(self._starts) - bisect.bisect_right(self._starts, time)
        return _BEFORE if back == len(self._starts) else (self._newest - back) % EPOCHS

    def places(self, times: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """`place` of many."""
        starts = np.array(self._starts, np.uint64)
        back = len(starts) - np.searchsorted(starts, times, side="right")
        return np.where(back == len(starts), _BEFORE, (self._newest - back) % EPOCHS)

    def begin_epoch(self, time: int) -> int:
        """A new epoch begins; returns the place that it takes over. What is counted there belongs
        to the epochs that are not told apart any more."""
        self._starts.append(time)
        del self._starts[:-EPOCHS]
        self._newest = (self._newest + 1) % EPOCHS
        return self._newest

    def restart(self, times: npt.NDArray[np.uint64]) -> None:
        """Epochs such that each has as many of these times as any other."""
        if len(times):
            shares = np.arange(1, EPOCHS) / EPOCHS
            starts = np.quantile(times, shares, method="lower")
            self._starts = np.unique(starts).astype(np.int64).tolist()
            self._newest = 0

    def mean_ages(self, now: int) -> npt.NDArray[np.float64]:
        """How long ago, about, pages of each count were used."""
        ends = [*self._starts[1:], now]
        ages = np.zeros(N_COUNTS)
        for back in range(len(self._starts)):
            start, end = self._starts[-1 - back], ends[-1 - back]
            ages[(self._newest - back) % EPOCHS] = max(now - (start + end) / 2, 0.0)
        ages[_BEFORE] = 1.5 * max(now - self._starts[0], 0)
        return ages
