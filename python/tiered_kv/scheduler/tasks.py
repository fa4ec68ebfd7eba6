"""Deadlines of whole programs (`slo.task_ms`), and what a call inherits of them.

A call's first token is due when there is just time left for its own answer and for the calls that
are still to come. How many these are, and how long one takes with the pause before it, is learned
from the programs that this server has seen; who says that a call is the last one is believed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol, TypeVar

from tiered_kv.scheduler.programs import Program, Programs
from tiered_kv.scheduler.request import QueuedRequest
from tiered_kv.scheduler.request_policy import SchedulerState
from tiered_kv.scheduler.working_set import WorkingSet

#: Calls of a program that are counted one by one; the rest are like the last.
CALLS_MAX = 256
#: Old programs count half after so many new ones.
PROGRAMS_HALF = 2048
#: A time counts this much beside the mean of those before it.
WEIGHT = 0.05


class Waiting(Protocol):
    """One who waits, as whoever orders them keeps it."""

    @property
    def request(self) -> QueuedRequest: ...


W = TypeVar("W", bound=Waiting)


class _Mean:
    """An exponential mean; 0 before the first value."""

    def __init__(self) -> None:
        self.value = 0.0
        self._n = 0

    def add(self, value: float) -> None:
        self._n += 1
        self.value += max(WEIGHT, 1.0 / self._n) * (value - self.value)


class Tasks:
    """What programs were given so far, and when their calls are due. Work: O(1) for each event, but
    O(`CALLS_MAX`) for a call that arrives with a task's deadline."""

    def __init__(self, *, working_set: bool = False) -> None:
        """working_set: whether programs pause while the contexts of others fill the memory."""
        self.programs = Programs()
        self._working_set = WorkingSet() if working_set else None
        self._reached = [0.0] * (CALLS_MAX + 1)
        """How many programs came to their n-th call."""
        self._pause_s, self._run_s, self._answer_s = _Mean(), _Mean(), _Mean()

    def arrived(self, request: QueuedRequest, now_s: float) -> None:
        """A call waits, for the first time or again."""
        program, is_new = self.programs.arrived(request, now_s)
        if self._working_set is not None:
            self._working_set.arrived(request, program, now_s)
        if not is_new or not request.program:
            return
        if program.n_calls > 1 and program.n_open == 1:
            self._pause_s.add(max(0.0, request.arrival_s - program.ended_s))
        self._reached[min(program.n_calls, CALLS_MAX)] += 1.0
        if self._reached[1] > 2 * PROGRAMS_HALF:
            self._reached = [count / 2.0 for count in self._reached]

    def admitted(self, request: QueuedRequest, now_s: float) -> None:
        """It runs from now on."""
        self.programs.admitted(request, now_s)
        if self._working_set is not None:
            self._working_set.admitted(request, self.programs.of(request), now_s)

    def ended(self, request: QueuedRequest, now_s: float) -> None:
        """It has its answer, or none."""
        if request.admitted_s is not None and request.first_token_s is not None:
            self._run_s.add(now_s - request.admitted_s)
            self._answer_s.add(now_s - request.first_token_s)
        program = self.programs.ended(request, now_s)
        if self._working_set is not None and program is not None:
            self._working_set.ended(request, program, now_s)

    def plan(self, state: SchedulerState) -> None:
        """`unpaused` is asked about a plan from `state`."""
        if self._working_set is not None:
            self._working_set.plan(state)

    def unpaused(
        self,
        request_ids: Iterator[int],
        waiting: Mapping[int, W],
        key: Callable[[W], float],
    ) -> Iterator[int]:
        """`request_ids` of those who wait, without those whose programs pause (`WorkingSet`)."""
        if self._working_set is None:
            return request_ids

        def of(request_id: int) -> tuple[Program, int]:
            request = waiting[request_id].request
            lacking = request.prompt_tokens + request.output_tokens - request.device_tokens
            return self.programs.of(request), lacking

        return self._working_set.unpaused(request_ids, of, lambda rid: key(waiting[rid]))

    def started_s(self, request: QueuedRequest) -> float:
        """When the first call of its program arrived."""
        return self.programs.of(request).started_s

    def due_s(self, request: QueuedRequest) -> float:
        """When its first token is due for its program to be in time; infinity: whenever."""
        task_s = request.slo.task_s
        if task_s is None:
            return math.inf
        program = self.programs.of(request)
        calls_left = 0.0 if request.is_last_call else self._calls_left(program)
        rest_s = self._answer_s.value + calls_left * (self._pause_s.value + self._run_s.value)
        return program.started_s + task_s - rest_s

    def _calls_left(self, program: Program) -> float:
        """How many more calls those programs made that made as many as this one, in the mean."""
        n_calls = min(program.n_calls, CALLS_MAX)
        here = self._reached[n_calls]
        return sum(self._reached[n_calls + 1 :]) / here if here else 0.0
