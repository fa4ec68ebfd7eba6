"""Pausing programs at their tool boundaries: as ThunderAgent does (arXiv 2602.13692).

As long as the contexts of the programs in progress fit the device, calls are served as they come.
Beyond, a program's next call waits until others are done: those in progress keep their place, the
smallest of the paused ones are taken in next, and whoever has paused for `PAUSE_MAX_S` is. One that
is out at its tool counts less the longer it stays there, so nobody keeps a place for good.
"""

from __future__ import annotations

from tiered_kv.memory.read_order import Urgency
from tiered_kv.scheduler.plan import AdmissionPlan
from tiered_kv.scheduler.policies.plas import LeastAttainedProgram
from tiered_kv.scheduler.programs import Program
from tiered_kv.scheduler.request import QueuedRequest
from tiered_kv.scheduler.request_policy import SchedulerState

#: After so long a program counts half while its tool runs; ours, the paper gives no figure.
HALF_LIFE_S = 10.0
#: Nobody pauses for longer; the paper has no bound.
PAUSE_MAX_S = 60.0


class PausingPrograms(LeastAttainedProgram):
    """Who is in progress is decided anew with every plan, from those who were."""

    def __init__(self) -> None:
        super().__init__()
        self._in_progress: dict[Program, None] = {}

    def on_admission(self, request: QueuedRequest, now_s: float) -> None:
        """Its program is in progress."""
        super().on_admission(request, now_s)
        self._in_progress[self.programs.of(request)] = None

    def plan(self, state: SchedulerState, limit: int) -> AdmissionPlan:
        """See `RequestPolicy.plan`."""
        free = self._room(state)
        order: list[int] = []
        taken_in: set[Program] = set()
        for request in sorted(state.candidates(), key=lambda one: self._key_at(one, state.now_s)):
            program = self.programs.of(request)
            is_in = program in self._in_progress or program in taken_in
            has_paused = state.now_s - request.arrival_s > PAUSE_MAX_S
            if not is_in and not has_paused and request.prompt_tokens > free and order:
                continue
            if not is_in:
                taken_in.add(program)
                free -= request.prompt_tokens
            order.append(request.request_id)
            if len(order) == limit:
                break
        return AdmissionPlan(tuple(order))

    def urgency(self, request: QueuedRequest) -> Urgency:
        """Those in progress before those who pause."""
        return float(self.programs.of(request) not in self._in_progress), request.arrival_s

    def _key_at(self, request: QueuedRequest, now_s: float) -> tuple[int, float]:
        if self.programs.of(request) in self._in_progress:
            return 0, request.arrival_s
        if now_s - request.arrival_s > PAUSE_MAX_S:
            return 1, request.arrival_s
        return 2, float(request.prompt_tokens)

    def _room(self, state: SchedulerState) -> float:
        """Tokens of contexts that may still be in progress; without knowing the pool, no limit."""
        if state.available_tokens is None:
            return float("inf")
        pool = state.available_tokens + state.decode_context_tokens
        used = 0.0
        for program in list(self._in_progress):
            weight = 1.0
            if not program.n_open:
                weight = 0.5 ** ((state.now_s - program.ended_s) / HALF_LIFE_S)
            if weight < 1 / 16:
                del self._in_progress[program]  # Its tool takes long: it pauses with its next call.
                continue
            used += weight * program.context_tokens
        return pool - used
