"""Spreads the I/Os of one batch over threads."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import TypeAlias

InFlight: TypeAlias = AbstractContextManager[object]
"""Entered around the system call of a job; lets `io_threads` through at a time."""


class IoPool:
    """`io_threads` I/Os in flight per batch, and one thread more: the calling thread works too.

    So while every I/O that may be in flight is, another thread computes checksums for the next; a
    batch makes progress even if the other threads are busy with another batch (or stuck in a
    stalled disk); and a batch of one I/O costs no hand-over.
    """

    def __init__(self, io_threads: int) -> None:
        self.io_threads = io_threads
        self._executor = ThreadPoolExecutor(io_threads, thread_name_prefix="tiered-kv-disk")

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
        helpers = [self._executor.submit(work) for _ in range(n_helpers)]
        work()
        for helper in helpers:
            if not helper.cancel():
                helper.result()

    def close(self, *, wait: bool = True) -> None:
        self._executor.shutdown(wait=wait)
