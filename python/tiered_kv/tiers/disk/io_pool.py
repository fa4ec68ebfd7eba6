"""Spreads the I/Os of one batch over threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor


class IoPool:
    """`io_threads` I/Os at a time per batch: the calling thread works too.

    So a batch makes progress even if the other threads are busy with another batch (or stuck in a
    stalled disk), and a batch of one I/O costs no hand-over.
    """

    def __init__(self, io_threads: int) -> None:
        self.io_threads = io_threads
        self._executor = (
            ThreadPoolExecutor(io_threads - 1, thread_name_prefix="tiered-kv-disk")
            if io_threads > 1
            else None
        )

    def run(self, jobs: Sequence[Callable[[], None]]) -> None:
        """Run every job, roughly in order, and return when all are done. Jobs must not raise."""
        waiting = deque(jobs)

        def work() -> None:
            while True:
                try:
                    job = waiting.popleft()
                except IndexError:
                    return
                job()

        helpers = []
        if self._executor is not None:
            n_helpers = min(len(jobs), self.io_threads) - 1
            helpers = [self._executor.submit(work) for _ in range(n_helpers)]
        work()
        for helper in helpers:
            if not helper.cancel():
                helper.result()

    def close(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True)
