"""Notices a disk that hangs, so that nobody waits for it who has not begun to."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator

logger = logging.getLogger(__name__)

STALL_AFTER_S = 2.0
"""An I/O of at most some megabytes that takes longer than this is no longer merely slow."""


class StallWatch:
    """Knows the I/Os under way: while the oldest hangs, reads are misses and writes are refused.

    Nothing polls: whoever asks finds out. One line is logged when a stall is first seen, one when
    the last I/O that hung has come back.
    """

    def __init__(self, name: str, now: Callable[[], float] = time.monotonic) -> None:
        self._name = name
        self._now = now
        self._lock = threading.Lock()
        self._tickets = itertools.count()
        self._started: dict[int, float] = {}  # In order of starting: the first is the oldest.
        self._stalled_since: float | None = None

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Entered around a system call that moves data."""
        with self._lock:
            ticket = next(self._tickets)
            self._started[ticket] = self._now()
        try:
            yield
        finally:
            with self._lock:
                del self._started[ticket]
                stalled_s = self._end_stall()
            if stalled_s is not None:
                logger.warning("Disk tier %s answers again after %.1f s.", self._name, stalled_s)

    def is_stalled(self) -> bool:
        """Has some I/O been under way for more than 2 s?"""
        with self._lock:
            if not self._has_old():
                return False
            is_new = self._stalled_since is None
            if is_new:
                self._stalled_since = next(iter(self._started.values()))
        if is_new:
            logger.warning(
                "Disk tier %s does not answer for %.0f s; until it does, pages are computed rather "
                "than read, and none are written.",
                self._name,
                STALL_AFTER_S,
            )
        return True

    def _has_old(self) -> bool:
        oldest = next(iter(self._started.values()), None)
        return oldest is not None and self._now() - oldest > STALL_AFTER_S

    def _end_stall(self) -> float | None:
        """How long the stall lasted, if it is over now."""
        if self._stalled_since is None or self._has_old():
            return None
        stalled_s = self._now() - self._stalled_since
        self._stalled_since = None
        return stalled_s
