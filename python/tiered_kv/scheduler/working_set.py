"""Working sets: which programs may run at a time, so that their contexts stay in memory together.

An agent's context is cached between two calls, and lost if others need the room: beyond what fits,
every call computes again what the one before had. So programs pause at their tool boundaries, as
whole programs (ThunderAgent, arXiv 2602.13692): those in progress keep their place, and a call of
another one waits in the queue until what memory lacks of it fits beside them. A program that is at
its tool counts with the chance that it goes on, as learned, and less the longer it stays away. What
several have in common counts once, as of a request only what the device lacks is counted.

Whoever asks decides for whom it holds; nothing here makes a request wait by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from tiered_kv.scheduler.programs import Program
from tiered_kv.scheduler.request import QueuedRequest
from tiered_kv.scheduler.request_policy import SchedulerState

#: After so long at its tool a program counts half; ours, the paper gives no figure.
HALF_LIFE_S = 60.0
#: After so long it has lost its place.
PLACE_S = 4 * HALF_LIFE_S
#: Of programs that went on and that did not, the old count half after so many new ones.
PROGRAMS_HALF = 256
#: Of those that pause, so many are looked at for one plan.
PAUSED_LOOK = 64
#: And of calls of programs in progress that come behind them, so many, the first to arrive.
READY_LOOK = 128


@dataclass(slots=True, eq=False)
class _Place:
    """A program in progress."""

    tokens: int = 0
    """Of its context, those that it does not share, as far as is known."""
    is_away: bool = False
    """At its tool: no call is open,"""
    since_s: float = 0.0
    counted: float = 0.0
    """and so many tokens counted when that began."""


class WorkingSet:
    """Work: O(1) for each event, amortised, and for each request asked about."""

    def __init__(self) -> None:
        self._places: dict[Program, _Place] = {}
        self._away: dict[Program, _Place] = {}
        """Those at their tools, the longest away first."""
        self._open_tokens = 0
        self._away_tokens = 0.0
        """What those at their tools count, at `_decayed_s`."""
        self._decayed_s = 0.0
        self._n_back, self._n_lost = 0.0, 0.0
        """Programs that came back while they had their place, and that did not."""
        self._waiting: dict[Program, dict[int, None]] = {}
        self._ready: dict[int, None] = {}
        """Calls that wait, of programs in progress."""
        # While a plan is made.
        self._taken_in: set[Program] = set()
        self._room = 0.0
        self._must_take = False

    def __len__(self) -> int:
        """Programs in progress."""
        return len(self._places)

    # -- what happens -------------------------------------------------------------------------

    def arrived(self, request: QueuedRequest, program: Program, now_s: float) -> None:
        """A call of `program` waits."""
        self._decay(now_s)
        self._waiting.setdefault(program, {})[request.request_id] = None
        place = self._places.get(program)
        if place is not None:
            self._back(program, place, now_s)
            self._ready[request.request_id] = None

    def left_queue(self, request_id: int, program: Program) -> None:
        """It does not wait any more."""
        self._ready.pop(request_id, None)
        waiting = self._waiting.get(program)
        if waiting is not None:
            waiting.pop(request_id, None)
            if not waiting:
                del self._waiting[program]

    def admitted(self, request: QueuedRequest, program: Program, now_s: float) -> None:
        """It runs: its program is in progress."""
        self._decay(now_s)
        self.left_queue(request.request_id, program)
        place = self._places.get(program)
        if place is None:
            place = self._places[program] = _Place()
            self._ready.update(self._waiting.get(program, {}))
        self._back(program, place, now_s)
        self._grow(place, request.prompt_tokens - request.device_tokens, request.prompt_tokens)

    def ended(self, request: QueuedRequest, program: Program, now_s: float) -> None:
        """It has its answer, or none."""
        self._decay(now_s)
        self.left_queue(request.request_id, program)
        place = self._places.get(program)
        if place is None:
            return
        self._grow(place, request.output_tokens, request.prompt_tokens + request.output_tokens)
        if program.n_open or place.is_away:
            return
        place.is_away, place.since_s = True, now_s
        place.counted = 0.0 if request.is_last_call else self._chance() * place.tokens
        self._open_tokens -= place.tokens
        self._away_tokens += place.counted
        self._away[program] = place

    def _grow(self, place: _Place, n_tokens: int, context_tokens: int) -> None:
        """What was lost and computed again is no more context than there is."""
        grown = max(0, min(n_tokens, context_tokens - place.tokens))
        place.tokens += grown
        self._open_tokens += grown

    def _back(self, program: Program, place: _Place, now_s: float) -> None:
        """It has an open call."""
        if place.is_away:
            self._count(back=1.0)
            place.is_away = False
            del self._away[program]
            self._away_tokens -= place.counted * _weight(now_s - place.since_s)
            self._open_tokens += place.tokens

    def _chance(self) -> float:
        """That a program goes on."""
        return self._n_back / (self._n_back + self._n_lost + 1.0)

    def _count(self, *, back: float = 0.0, lost: float = 0.0) -> None:
        self._n_back, self._n_lost = self._n_back + back, self._n_lost + lost
        if self._n_back + self._n_lost > 2 * PROGRAMS_HALF:
            self._n_back, self._n_lost = self._n_back / 2.0, self._n_lost / 2.0

    def _decay(self, now_s: float) -> None:
        self._away_tokens *= _weight(now_s - self._decayed_s)
        self._decayed_s = now_s
        while self._away:
            program, place = next(iter(self._away.items()))
            if now_s - place.since_s < PLACE_S:
                break
            self._away_tokens -= place.counted * _weight(now_s - place.since_s)
            del self._away[program], self._places[program]
            self._count(lost=1.0)
        # Differences of what was rounded add up to something.
        self._away_tokens = max(0.0, self._away_tokens) if self._away else 0.0

    # -- a plan -------------------------------------------------------------------------------

    def plan(self, state: SchedulerState) -> None:
        """What follows is asked about a plan from `state`."""
        self._decay(state.now_s)
        self._taken_in.clear()
        pool = state.available_tokens
        self._room = float("inf")
        if pool is not None:
            # What is on the device is on the host as well, before it leaves.
            pool = max(pool + state.decode_context_tokens, state.host_tokens)
            self._room = pool - self._open_tokens - self._away_tokens
        # The device never rests for those who are away.
        self._must_take = not state.running and state.unfinished is None

    def planned(self, program: Program, n_tokens: int) -> None:
        """A call of `program`, of which the device lacks so many tokens, is in the plan."""
        self._must_take = False
        if program not in self._places and program not in self._taken_in:
            self._taken_in.add(program)
            self._room -= n_tokens

    def pauses(self, program: Program, n_tokens: int) -> bool:
        """Whether a call of `program`, of which the device lacks so many tokens, is to wait."""
        if program in self._places or program in self._taken_in:
            return False
        return n_tokens > self._room and not self._must_take

    def unpaused(
        self,
        request_ids: Iterator[int],
        of: Callable[[int], tuple[Program, int]],
        key: Callable[[int], float],
    ) -> Iterator[int]:
        """`request_ids` without those that pause; each is taken in unless whoever asks stops.

        of: a call's program, and how many tokens the device lacks of it. key: the order of those
        in progress that come behind many who pause.
        """
        n_paused = 0
        for request_id in request_ids:
            program, n_tokens = of(request_id)
            if not self.pauses(program, n_tokens):
                yield request_id
                self.planned(program, n_tokens)
                continue
            n_paused += 1
            if n_paused == PAUSED_LOOK:
                break
        else:
            return
        yield from sorted(islice(self._ready, READY_LOOK), key=key)


def _weight(seconds: float) -> float:
    return math.pow(0.5, max(0.0, seconds) / HALF_LIFE_S)
