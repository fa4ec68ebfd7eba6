"""Asynchronous transfer jobs: one FIFO queue and one thread per edge between two tiers.

The thread that owns the forest submits jobs and polls for completions; it never waits for I/O.
Because every queue finishes its jobs in the order of submission, "how many are done" says which:
tensor-parallel ranks agree on completions by one minimum over those counts.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

logger = logging.getLogger(__name__)

#: How long closing waits for the job under way before it leaves the thread to itself.
LONGEST_JOB_S = 3.0


class Job(Protocol):
    @property
    def n_pages(self) -> int: ...


J = TypeVar("J", bound=Job)

#: Is told, on the worker's thread, of a job that is over: the queue's name, the job, from when to
#: when it ran (time.perf_counter), and how many leading pages arrived.
JobObserver = Callable[[str, Job, float, float, int], None]


@dataclass(slots=True)
class Wanted:
    """Of a job: changed by the owner when nobody needs it any more; read by the worker."""

    by_anyone: bool = True
    until_s: float = math.inf
    """By time.monotonic."""

    def is_over(self) -> bool:
        return not self.by_anyone or time.monotonic() > self.until_s


@dataclass(frozen=True, slots=True)
class Completion(Generic[J]):
    """What became of a job: its leading `n_done` pages arrived."""

    job: J
    n_done: int
    seconds: float
    """From submit to end, time in the queue included."""
    service_s: float
    """Time that the job itself took, without what it had to wait for (see `took`)."""
    is_as_asked: bool = True
    """Whether all of it came that was asked for until nobody wanted the rest."""


class Collective(Protocol):
    """Agreement between tensor-parallel ranks: element-wise minimum; all ranks make the call."""

    def minimum(self, values: list[int]) -> list[int]: ...


class SingleRank:
    def minimum(self, values: list[int]) -> list[int]:
        return values


class Meeting(Protocol):
    """Agreement between the stages of a pipeline, which are passes apart and cannot wait.

    What a stage gives in one of its passes it gets the minimum of some passes later, when all
    stages, and all ranks of each, have come to the pass in which it was given.
    """

    n_pass: int
    """The pass this stage is in: the same pass has the same number on all stages."""
    lag: int
    """Passes until who asks need not wait for a stage that waits for him."""

    def give(self, values: list[int]) -> Callable[[], list[int]]:
        """Begins a minimum, element by element; what is returned waits for it.

        All stages give as many values, in the same pass.
        """


class TransferQueue(Generic[J]):
    """Runs jobs one after the other on a thread of its own.

    run: does one job and returns how many leading pages arrived. An exception counts as 0 pages,
    is logged, and never ends the thread.
    begin: called first on that thread.
    """

    def __init__(
        self, name: str, run: Callable[[J], int], begin: Callable[[], None] | None = None
    ) -> None:
        self.name = name
        self._run = run
        self._begin = begin
        self._jobs: queue.SimpleQueue[tuple[J, float] | None] = queue.SimpleQueue()
        self._open: deque[J] = deque()
        self._finished: deque[Completion[J]] = deque()
        self._n_submitted = 0
        self._n_finished = 0
        self._n_acknowledged = 0
        self._pages_in_flight = 0
        self._is_closing = False
        self.observe: JobObserver | None = None
        self._begun_at = 0.0
        self._progress = threading.Condition()
        self._start()

    def _start(self) -> None:
        self._thread = threading.Thread(
            target=self._work, name=f"tiered-kv-{self.name}", daemon=True
        )
        self._thread.start()

    # -- the owner's side ---------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """Jobs submitted and not yet acknowledged: the same number on every rank."""
        return self._n_submitted - self._n_acknowledged

    @property
    def pages_in_flight(self) -> int:
        return self._pages_in_flight

    @property
    def open_jobs(self) -> tuple[J, ...]:
        """The jobs in flight, in the order of submission."""
        return tuple(self._open)

    @property
    def n_ready(self) -> int:
        """Jobs finished on this rank and not yet acknowledged."""
        return self._n_finished - self._n_acknowledged

    def submit(self, job: J) -> None:
        self._n_submitted += 1
        self._pages_in_flight += job.n_pages
        self._open.append(job)
        self._jobs.put((job, time.perf_counter()))

    def acknowledge(self, n: int) -> list[Completion[J]]:
        """Takes the next `n` completions (n <= n_ready), in the order of submission."""
        taken = [self._finished.popleft() for _ in range(n)]
        self._n_acknowledged += n
        for _ in range(n):
            self._open.popleft()
        self._pages_in_flight -= sum(c.job.n_pages for c in taken)
        return taken

    def ready(self) -> list[int]:
        """What ranks take the minimum of, element by element, to agree on what is done."""
        return [self.n_ready]

    def everything(self) -> list[int]:
        """What `ready` says when every submitted job has finished."""
        return [self.in_flight]

    def take(self, ready: Sequence[int]) -> list[Completion[J]]:
        """Takes the completions that all ranks have ready."""
        return self.acknowledge(ready[0])

    def ended_here(self) -> list[tuple[int, Completion[J] | None]]:
        """The jobs in flight by number, as they were submitted; None of one that has not ended."""
        with self._progress:
            ended = list(self._finished)
        first = self._n_acknowledged
        none: list[Completion[J] | None] = [None] * (len(self._open) - len(ended))
        return list(enumerate([*ended, *none], first))

    def take_one(self, number: int) -> Completion[J] | None:
        """The completion of a job that has ended, the next in the order; None: it was taken."""
        return self.acknowledge(1)[0] if number >= self._n_acknowledged else None

    def wait(self, timeout_s: float | None = None) -> bool:
        """Blocks until every submitted job has finished; False if the time ran out."""
        with self._progress:
            return self._progress.wait_for(lambda: self._n_finished == self._n_submitted, timeout_s)

    def wait_for_one(self, timeout_s: float) -> None:
        """Blocks until a job has finished that is not acknowledged yet, or the time ran out."""
        with self._progress:
            self._progress.wait_for(lambda: self.n_ready > 0, timeout_s)

    def end(self) -> None:
        """Ends the thread after the job under way; jobs not begun are dropped, as 0 pages."""
        self._is_closing = True
        self._jobs.put(None)

    def close(self, timeout_s: float = LONGEST_JOB_S) -> None:
        """Waits for the thread's end, but no longer."""
        self.end()
        self._thread.join(timeout_s)

    # -- the worker's side --------------------------------------------------------------------

    def took(self, seconds: float) -> None:
        """Called by `run` as its job ends: so long it took, by a better clock than this one's."""
        self._begun_at = time.perf_counter() - seconds

    def exclude(self, seconds: float) -> None:
        """Called by `run`: for so long its job was held up on purpose, which was no service."""
        self._begun_at += seconds

    def _work(self) -> None:
        if self._begin is not None:
            self._begin()
        while self._finish_one():
            pass

    def _finish_one(self) -> bool:
        """False when the queue is closed. (A function: no variable keeps a job after its turn.)"""
        item = self._jobs.get()
        if item is None:
            return False
        job, submitted_at = item
        self._begun_at = time.perf_counter()
        try:
            n_done = 0 if self._is_closing else self._run(job)
        except Exception:
            logger.exception("Tiered KV: a %s transfer failed, its pages are lost", self.name)
            n_done = 0
        ended_at = time.perf_counter()
        seconds, service_s = ended_at - submitted_at, ended_at - self._begun_at
        completion = Completion(job, n_done, seconds, service_s, n_done == job.n_pages)
        if self.observe is not None:
            self.observe(self.name, job, ended_at - completion.service_s, ended_at, n_done)
        with self._progress:
            self._finished.append(completion)
            self._n_finished += 1
            self._progress.notify_all()
        return True
