"""Pauses between the calls of a program, learned where no caller says how long they take.

What an agent does between two calls, its tools take about as long as they took before (Continuum,
arXiv 2511.02230, keeps KV for a time to live by the tool's past times). A pause is learned under
all that is known when the answer ends: the tool that the caller names, how the answer ended (a
model ends one that calls a tool otherwise than one that is for a person), whose program it is. The
most particular of these of which enough was seen foretells the next.

Programs that do not come back count as well: of what mostly ends there, nothing is foretold. And
names are the callers' inventions: only so many are known, and one takes the place of another only
if nobody used that for long.
"""

from __future__ import annotations

import heapq
import math
from array import array
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

from tiered_kv.scheduler.next_calls import gone_after_s
from tiered_kv.scheduler.request import QueuedRequest

#: Pauses are told apart by factors of sqrt(2), from
SHORTEST_S = 0.05
#: to a day and longer.
N_BUCKETS = 42
#: So many were seen before anything is foretold from them.
LEAST = 8
#: The old count half after so many new ones.
PAUSES_HALF = 256
#: Names (tools, ends of answers, tenants) under which pauses are learned.
NAMES_MAX = 1024
#: One that was not used for so long makes way for a new one.
NAME_QUIET_S = 3600.0
#: Programs that may come back, and programs with pauses of their own.
PROGRAMS_MAX = 8192
#: Whoever was away for so long does not come back.
NEVER_S = 3600.0
#: Of whom nothing was foretold is late after so long.
LATE_S = 60.0
#: Of those that come back, so many should have come when they are due: half.
DUE_SHARE = 0.5
#: What is less likely is not foretold.
LEAST_PROBABILITY = 0.5


@dataclass(frozen=True, slots=True)
class Pause:
    """What is foretold of the next call: see `NextCalls.announce`."""

    in_s: float
    probability: float


@dataclass(slots=True, eq=False)
class _Pauses:
    """What was seen under one name."""

    counts: array[float] = field(default_factory=lambda: array("f", bytes(4 * N_BUCKETS)))
    came: float = 0.0
    never: float = 0.0
    late: int = 0
    """Programs that were expected, and may still come."""
    used_s: float = -math.inf

    @property
    def seen(self) -> float:
        return self.came + self.never

    def add(self, pause_s: float) -> None:
        self.counts[_bucket(pause_s)] += 1.0
        self.came += 1.0
        self._age()

    def missed(self) -> None:
        """One that was expected did not come."""
        self.never += 1.0
        self._age()

    def _age(self) -> None:
        if self.seen > 2 * PAUSES_HALF:
            for index, count in enumerate(self.counts):
                self.counts[index] = count / 2.0
            self.came, self.never = sum(self.counts), self.never / 2.0

    def foretold(self) -> Pause:
        """When half of those that come have come; the rest has as long again, as if it was said."""
        in_s = self.quantile(DUE_SHARE)
        gone_s = gone_after_s(in_s)
        comes = self.came / (self.came + self.never + self.late + 1.0)
        return Pause(in_s, comes * self.share_within(gone_s))

    def quantile(self, share: float) -> float:
        """Of the pauses of those that came, in seconds."""
        left = share * self.came
        for index, count in enumerate(self.counts):
            if count and left <= count:
                return _bound(index + left / count)
            left -= count
        return _bound(N_BUCKETS)

    def share_within(self, seconds: float) -> float:
        """Of those that came, how many had come after so long."""
        last = _bucket(seconds)
        return min(1.0, sum(self.counts[: last + 1]) / self.came) if self.came else 0.0


@dataclass(slots=True, eq=False)
class _Away:
    """A program between two calls."""

    since_s: float
    learning: list[_Pauses]
    """What is to learn from it."""
    is_late: bool = False

    def expires(self) -> None:
        """It was expected by now."""
        self.is_late = True
        for pauses in self.learning:
            pauses.late += 1

    def over(self) -> None:
        """Nobody waits for it any more."""
        if self.is_late:
            for pauses in self.learning:
                pauses.late -= 1


class LearnedPauses:
    """One for each scheduler. Work for each call that comes or ends: O(log `PROGRAMS_MAX`),
    amortised."""

    def __init__(self) -> None:
        self._by_name: dict[Hashable, _Pauses] = {}
        """Whoever was used longest ago first."""
        self._of_program: dict[str, _Pauses] = {}
        self._all = _Pauses()
        self._away: dict[str, _Away] = {}
        """By program, the longest away first."""
        self._expected: list[tuple[float, float, str]] = []
        """When each is late, and since when it is away; with entries gone stale."""

    def __len__(self) -> int:
        """Names and programs that are remembered."""
        return len(self._by_name) + len(self._of_program) + len(self._expected)

    def arrived(self, request: QueuedRequest, now_s: float) -> None:
        """A new call is there: its program's pause is over."""
        self._give_up(now_s)
        away = self._away.pop(request.program, None)
        if away is None:
            return
        away.over()
        pause_s = max(0.0, request.arrival_s - away.since_s)
        own = self._of_program.pop(request.program, None) or _Pauses()
        self._of_program[request.program] = own
        own.add(pause_s)
        if len(self._of_program) > PROGRAMS_MAX:
            del self._of_program[next(iter(self._of_program))]
        for pauses in away.learning:
            pauses.add(pause_s)

    def ended(self, request: QueuedRequest, ending: Hashable, now_s: float) -> Pause | None:
        """A call has its answer, which ended so: when does the next one come?

        ending: equal for answers that end alike; None: nobody can tell. Returns None if nobody can
        tell when, if likely none comes, or if it is the last.
        """
        self._give_up(now_s)
        if (before := self._away.pop(request.program, None)) is not None:
            before.over()
        if not request.program or request.is_last_call:
            self._of_program.pop(request.program, None)
            return None
        named = list(self._named(request, ending, now_s))
        self._away[request.program] = _Away(now_s, [*named, self._all])
        own = self._of_program.get(request.program)
        known = (*named, *([own] if own is not None else []), self._all)
        pause = next((one.foretold() for one in known if one.seen >= LEAST), None)
        late_s = LATE_S if pause is None else min(gone_after_s(pause.in_s), NEVER_S)
        heapq.heappush(self._expected, (now_s + late_s, now_s, request.program))
        is_likely = pause is not None and pause.probability >= LEAST_PROBABILITY
        return pause if is_likely else None

    def _named(self, request: QueuedRequest, ending: Hashable, now_s: float) -> Iterator[_Pauses]:
        """What is known by the names of such a call, the most particular first."""
        names: list[Hashable] = []
        if request.tool:
            names.append((request.tenant, request.tool, ending))
        if ending is not None:
            names.append((request.tenant, "", ending))
        for name in names:
            pauses = self._by_name.pop(name, None)
            if pauses is None:
                if len(self._by_name) >= NAMES_MAX:
                    oldest = next(iter(self._by_name))
                    if now_s - self._by_name[oldest].used_s < NAME_QUIET_S:
                        continue
                    del self._by_name[oldest]
                pauses = _Pauses()
            self._by_name[name] = pauses
            pauses.used_s = now_s
            yield pauses

    def _give_up(self, now_s: float) -> None:
        """Who was expected is late by now; who is away for too long, and of too many who is away
        for longest, stays away."""
        while self._expected and self._expected[0][0] <= now_s:
            _, since_s, program = heapq.heappop(self._expected)
            away = self._away.get(program)
            if away is not None and away.since_s == since_s and not away.is_late:
                away.expires()
        while self._away:
            program, away = next(iter(self._away.items()))
            if now_s - away.since_s < NEVER_S and len(self._away) < PROGRAMS_MAX:
                break
            del self._away[program]
            self._of_program.pop(program, None)
            away.over()
            for pauses in away.learning:
                pauses.missed()
        if len(self._expected) > 2 * PROGRAMS_MAX:
            self._expected = [
                entry
                for entry in self._expected
                if (away := self._away.get(entry[2])) is not None and away.since_s == entry[1]
            ]
            heapq.heapify(self._expected)


def _bucket(seconds: float) -> int:
    if seconds <= SHORTEST_S:
        return 0
    return min(N_BUCKETS - 1, int(2.0 * math.log2(seconds / SHORTEST_S)))


def _bound(index: float) -> float:
    """Where a bucket begins; fractions are within it."""
    return SHORTEST_S * 2.0 ** (index / 2.0) if index else 0.0
