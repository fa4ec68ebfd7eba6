"""Degradation: after a call that failed there are none for a while, then it is tried again."""

from __future__ import annotations

import enum
import logging
import threading
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0


class Admission(enum.Enum):
    """A call that may go ahead; it is over with `succeed`, `fail` or `leave`."""

    CALL = enum.auto()
    PROBE = enum.auto()
    """It tells whether calls work again."""


class Gate:
    """Open while calls work. A failure closes it for 1 s, 2 s, 4 s ... at most 60 s.

    When a pause is over one call is let through; if it works the gate opens, if it fails the next
    pause is twice as long, and if it comes to nothing (its caller has gone, or there is no room)
    the next call is let through at once. One line is logged when the gate closes, and one when it
    opens.
    """

    def __init__(
        self,
        closes: str,
        opens: str,
        now: Callable[[], float] = time.monotonic,
        *,
        read_only: bool = False,
    ) -> None:
        """closes, opens: those lines; `%s` is the error, `%.1f` for how many seconds it was closed.

        read_only: it never opens.
        """
        self._closes, self._opens = closes, opens
        self._read_only = read_only
        self._now = now
        self._lock = threading.Lock()
        self._pause_s = 0.0
        self._retry_at = 0.0
        self._closed_at = 0.0
        self._probing = False

    @property
    def is_degraded(self) -> bool:
        return self._read_only or self._pause_s > 0.0

    @property
    def is_passable(self) -> bool:
        """Whether a call that came now would be let through."""
        if not self.is_degraded:
            return True
        with self._lock:
            return not (self._read_only or self._probing or self._now() < self._retry_at)

    def try_enter(self) -> Admission | None:
        """May this call go ahead?"""
        if not self.is_degraded:
            return Admission.CALL
        with self._lock:
            if self._read_only or self._probing or self._now() < self._retry_at:
                return None
            self._probing = True
            return Admission.PROBE

    def fail(self, admission: Admission, error: BaseException) -> None:
        """The call has failed. One that began before the gate was closed says nothing new."""
        if admission is Admission.CALL:
            self.shut(error)
            return
        with self._lock:
            self._pause_s = min(self._pause_s * 2, LONGEST_PAUSE_S)
            self._retry_at = self._now() + self._pause_s
            self._probing = False

    def leave(self, admission: Admission) -> None:
        """Nothing came of it, but for no fault of who was called: it proves nothing."""
        if admission is Admission.PROBE:
            with self._lock:
                self._probing = False

    def shut(self, error: BaseException) -> None:
        """Something else has failed, in a way that calls had better wait for."""
        with self._lock:
            if self.is_degraded:
                return
            self._pause_s = FIRST_PAUSE_S
            self._closed_at = self._now()
            self._retry_at = self._now() + self._pause_s
        logger.warning(self._closes, error)

    def succeed(self, admission: Admission) -> None:
        """It has worked. Only a probe opens the gate: what began before the failure proves
        nothing."""
        if admission is Admission.CALL:
            return
        with self._lock:
            closed_s = self._now() - self._closed_at
            self._probing = False
            self._pause_s = 0.0
        logger.warning(self._opens, closed_s)
