"""Calls that may be given up: whoever waits for one waits no longer than he said."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Asker:
    """Makes calls on a thread of its own, one after the other.

    Only for calls that touch no memory of others: one that was given up goes on by itself. While it
    does, all others are given up at once, so there is never more than one.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._calls: queue.SimpleQueue[_Call] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._overdue: _Call | None = None

    def ask(self, call: Callable[[], T], timeout_s: float) -> T:
        """What `call` returns or raises. Raises TimeoutError if that takes longer."""
        asked = _Call(call)
        with self._lock:
            if self._overdue is not None and not self._overdue.is_over.is_set():
                raise TimeoutError("an earlier call has not ended yet")
            self._overdue = None
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._thread.start()
            self._calls.put(asked)
        if not asked.is_over.wait(timeout_s):
            with self._lock:
                self._overdue = self._overdue or asked
            raise TimeoutError(f"no answer within {timeout_s:g} s")
        if asked.error is not None:
            raise asked.error
        answer: T = asked.answer
        return answer

    def _work(self) -> None:
        while True:
            self._calls.get().make()


class _Call:
    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self.is_over = threading.Event()
        self.answer: Any = None
        self.error: Exception | None = None

    def make(self) -> None:
        try:
            self.answer = self._call()
        except Exception as error:
            self.error = error
        self.is_over.set()
