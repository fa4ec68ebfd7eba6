"""Threads for I/O, and how the I/Os of one batch are spread over them."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any, TypeAlias, TypeVar

InFlight: TypeAlias = AbstractContextManager[object]
"""Entered around the system call of a job; lets `io_threads` through at a time."""

T = TypeVar("T")

_END_S = 1.0


class DaemonThreads:
    """Runs calls on threads, started as they are needed, which never keep the process alive.

    Those of `concurrent.futures` are joined when the interpreter ends: a disk that hangs would
    keep a server from stopping.
    """

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._name = name
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = (
            queue.SimpleQueue()
        )
        self._idle = threading.Semaphore(0)
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def submit(self, call: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self._calls.put((future, call))
        if not self._idle.acquire(blocking=False):
            with self._lock:
                if len(self._threads) < self._most:
                    name = f"{self._name}-{len(self._threads)}"
                    thread = threading.Thread(target=self._work, name=name, daemon=True)
                    self._threads.append(thread)
                    thread.start()
        return future

    def close(self) -> None:
        """Ends the threads. Those that have nothing to do end at once; others aren't waited for."""
        deadline = time.monotonic() + _END_S
        with self._lock:
            for _ in self._threads:
                self._calls.put(None)
            for thread in self._threads:
                thread.join(max(deadline - time.monotonic(), 0.0))

    def _work(self) -> None:
        while (item := self._calls.get()) is not None:
            _run(*item)
            del item
            self._idle.release()


def _run(future: Future[T], call: Callable[[], T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = call()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)


class IoPool:
    """`io_threads` I/Os in flight per batch, and one thread more: the calling thread works too.

    So while every I/O that may be in flight is, another thread computes checksums for the next; a
    batch makes progress even if the other threads are busy with another batch (or stuck in a
    stalled disk); and a batch of one I/O costs no hand-over.
    """

    def __init__(self, io_threads: int) -> None:
        self.io_threads = io_threads
        self._threads = DaemonThreads(io_threads, "tiered-kv-disk")

    def run(self, jobs: Sequence[Callable[[InFlight], None]]) -> None:
        """Run every job, roughly in order, and return when all are done. Jobs must not raise."""
        waiting = deque(jobs)
        in_flight = threading.Semaphore(self.io_threads)

        def work() -> None:
            while True:
                try:
                    job = waiting.popleft()
                except IndexError:
                    return
                job(in_flight)

        n_helpers = min(len(jobs) - 1, self.io_threads)
        helpers = [self._threads.submit(work) for _ in range(n_helpers)]
        work()
        for helper in helpers:
            if not helper.cancel():
                helper.result()

    def close(self) -> None:
        self._threads.close()
