"""Programs: the calls of one session together, and what was done for them so far.

An agent's task is many calls; what its user waits for is the last of them. So an order may go by
what a whole program was given, or by when it began, rather than by single requests (Agentix,
arXiv 2502.13965, as Autellix; Continuum, arXiv 2511.02230). What calls were given is kept in two
ways: as the sum over a program and those it started, and along each call's critical path, on which
the work of its siblings does not lie.

Names are the callers' inventions: only so many programs are known at a time, the one that was
quiet for longest is forgotten first, and whoever is one too many is a program of its own call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tiered_kv.scheduler.request import QueuedRequest

#: Programs that are known at a time, active or not.
PROGRAMS_MAX = 8192
#: A program that started others counts as one of this many generations at most.
GENERATIONS_MAX = 16


@dataclass(slots=True, eq=False)
class Program:
    """One program, from its first call on."""

    started_s: float
    """When its first call arrived; of one that another started, when that one's did."""
    served_s: float = 0.0
    """Seconds that its calls ran, and those of the programs that it started, together."""
    path_s: float = 0.0
    """The same along the longest path of calls that waited for one another, from its root on."""
    n_calls: int = 0
    """Calls that have come."""
    n_open: int = 0
    """Those of them that wait or run."""
    ended_s: float = 0.0
    """When a call ended last."""
    parent: Program | None = None
    context_tokens: int = 0
    """Of its latest call: prompt and answer."""

    def root(self) -> Program:
        """The program that started all of them."""
        at = self
        while at.parent is not None:
            at = at.parent
        return at


class Programs:
    """By name, as far as they are known. O(1) for each event, amortised."""

    def __init__(self, n_max: int = PROGRAMS_MAX) -> None:
        self._n_max = n_max
        self._by_name: dict[str, Program] = {}
        """The one that was quiet for longest first, as far as none of its calls is open."""
        self._of: dict[int, Program] = {}
        self._name_of: dict[int, str] = {}
        self._running_since_s: dict[int, float] = {}
        self._path_s: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._by_name)

    def __iter__(self) -> Iterator[Program]:
        """Those that are known by a name."""
        return iter(self._by_name.values())

    def of(self, request: QueuedRequest) -> Program:
        """The program of a call; of one that is not open, one that nobody knows."""
        return self._of.get(request.request_id) or Program(request.arrival_s)

    def path_s(self, request: QueuedRequest) -> float:
        """Seconds that calls ran on the longest path to this one, and it itself so far."""
        return self._path_s.get(request.request_id, 0.0)

    # -- what happens -------------------------------------------------------------------------

    def arrived(self, request: QueuedRequest, now_s: float) -> tuple[Program, bool]:
        """A call waits: its program, and whether it is a new one, not one that is back."""
        request_id = request.request_id
        self._stop(request, now_s)
        known = self._of.get(request_id)
        if known is not None:
            return known, False
        program = self._known(request)
        program.n_calls += 1
        program.n_open += 1
        program.context_tokens = request.prompt_tokens
        self._of[request_id] = program
        self._path_s[request_id] = program.path_s
        self._name_of[request_id] = request.program
        return program, True

    def admitted(self, request: QueuedRequest, now_s: float) -> None:
        """It runs from now on."""
        if request.request_id in self._of:
            self._running_since_s[request.request_id] = now_s

    def ended(self, request: QueuedRequest, now_s: float) -> Program | None:
        """It has its answer, or none: what it was given counts. None for one that is not open."""
        self._stop(request, now_s)
        program = self._of.pop(request.request_id, None)
        name = self._name_of.pop(request.request_id, "")
        self._path_s.pop(request.request_id, None)
        if program is None:
            return None
        program.n_open -= 1
        program.ended_s = now_s
        program.context_tokens = request.prompt_tokens + request.output_tokens
        if self._by_name.get(name) is program:
            # The latest to end is forgotten last.
            del self._by_name[name]
            self._by_name[name] = program
        return program

    def _stop(self, request: QueuedRequest, now_s: float) -> None:
        since_s = self._running_since_s.pop(request.request_id, None)
        if since_s is None:
            return
        ran_s = max(0.0, now_s - since_s)
        path_s = self._path_s[request.request_id] = self.path_s(request) + ran_s
        program: Program | None = self.of(request)
        while program is not None:
            # Whoever started it waits for it: the path through it is one of its own.
            program.served_s += ran_s
            program.path_s = max(program.path_s, path_s)
            program = program.parent

    # -- names --------------------------------------------------------------------------------

    def _known(self, request: QueuedRequest) -> Program:
        """The program of a call that arrives, from now on known by its name, if there is room."""
        name, parent = request.program, self._by_name.get(request.parent_program)
        program = self._by_name.get(name) if name else None
        if program is not None:
            return program
        program = Program(request.arrival_s)
        if parent is not None and _generation(parent) < GENERATIONS_MAX:
            program = Program(parent.started_s, path_s=parent.path_s, parent=parent)
        if name and self._has_room():
            self._by_name[name] = program
        return program

    def _has_room(self) -> bool:
        """Forgets the one that was quiet for longest if there are too many."""
        if len(self._by_name) < self._n_max:
            return True
        # Those with open calls are not forgotten, and are looked at once for each that ends.
        name, program = next(iter(self._by_name.items()))
        if program.n_open:
            del self._by_name[name]
            self._by_name[name] = program
            return False
        del self._by_name[name]
        return True


def _generation(program: Program) -> int:
    at, n = program.parent, 0
    while at is not None:
        at, n = at.parent, n + 1
    return n
