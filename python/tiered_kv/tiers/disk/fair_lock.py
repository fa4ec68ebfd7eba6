"""A lock that one thread takes again and again, and others need not wait for all of that."""

from __future__ import annotations

import threading


class FairLock:
    """Reentrant; who releases it and asks again comes after one who has been waiting.

    With Python's own locks it is mostly the other way round: who waits has yet to wake up.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._door = threading.Lock()
        """Held by one of those who wait; the others wait for it."""
        self._owner: int | None = None
        self._depth = 0

    def __enter__(self) -> None:
        me = threading.get_ident()
        if self._owner != me:
            with self._door:
                self._lock.acquire()
            self._owner = me
        self._depth += 1

    def __exit__(self, *exc_info: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._owner = None
            self._lock.release()
