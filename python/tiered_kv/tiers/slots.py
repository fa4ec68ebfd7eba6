"""A free list of page slots."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

PageIds = npt.NDArray[np.int64]


class SlotAllocator:
    """Hands out slot ids 0..n_slots-1, first in, first out, in O(1) numpy calls.

    FIFO keeps neighbouring slots together for as long as runs are freed whole, and contiguous runs
    are what makes copies and disk I/O cheap. Deterministic: tensor-parallel ranks that make the
    same calls hold the same ids.
    """

    def __init__(self, n_slots: int) -> None:
        self.n_slots = n_slots
        self._ring: PageIds = np.arange(n_slots, dtype=np.int64)
        self._head = 0
        self._n_free = n_slots

    @property
    def n_free(self) -> int:
        return self._n_free

    def alloc(self, n: int) -> PageIds | None:
        """`n` slot ids, or None (and nothing taken) if fewer are free."""
        if n > self._n_free:
            return None
        ids = self._ring.take(np.arange(self._head, self._head + n), mode="wrap")
        self._head = (self._head + n) % self.n_slots if self.n_slots else 0
        self._n_free -= n
        return ids

    def free(self, ids: PageIds) -> None:
        n = len(ids)
        if n + self._n_free > self.n_slots:
            raise AssertionError(f"{n} slots freed, but only {self.n_slots - self._n_free} are out")
        tail = self._head + self._n_free
        self._ring.put(np.arange(tail, tail + n), ids, mode="wrap")
        self._n_free += n

    def clear(self, keep: PageIds) -> None:
        """All slots but those in `keep` are free."""
        free = np.setdiff1d(np.arange(self.n_slots, dtype=np.int64), keep)
        self._ring[: len(free)] = free
        self._head = 0
        self._n_free = len(free)
