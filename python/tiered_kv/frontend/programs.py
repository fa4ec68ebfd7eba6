"""What the runs of functions look like from outside: sessions, their branches, and pauses.

A run is a session of calls, and so is each branch that it forks; a branch names the session that
forked it. What a program does next is mostly known: what is queued behind a call follows it, and
nothing follows the last one of a function that has returned. Where it is not, because the function
waits for the answer, the runs before tell: the n-th call of the same place in a function of the
same arguments is followed by a call after about the same pause, or by none.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

#: Places whose pauses are remembered; the one that was asked of least lately goes first.
PLACES_MAX = 4096
#: A pause counts this much beside the mean of those before it.
WEIGHT = 0.25


@dataclass(slots=True)
class _Seen:
    """What followed a call at one place, in exponential means."""

    pause_s: float = 0.0
    probability: float = 0.0
    n: int = 0

    def add(self, pause_s: float | None) -> None:
        self.n += 1
        weight = max(WEIGHT, 1.0 / self.n)
        self.probability += weight * ((pause_s is not None) - self.probability)
        if pause_s is not None:
            # The first pause is the mean, however many calls were followed by none.
            first = self.pause_s == 0.0
            self.pause_s += (1.0 if first else weight) * (pause_s - self.pause_s)


class Pauses:
    """What follows calls, learned from those that were made. Threads may share it."""

    def __init__(self, n_max: int = PLACES_MAX) -> None:
        self._n_max = n_max
        self._seen: dict[Hashable, _Seen] = {}
        # A chain may end where garbage is collected: in the thread that has the lock, too.
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._seen)

    def followed(self, place: Hashable, pause_s: float | None) -> None:
        """Another call came `pause_s` seconds after the one at `place` had ended; None: none."""
        with self._lock:
            seen = self._seen.pop(place, None) or _Seen()
            seen.add(pause_s)
            if len(self._seen) >= self._n_max:
                del self._seen[next(iter(self._seen))]
            self._seen[place] = seen

    def expected(self, place: Hashable) -> tuple[float, float] | None:
        """Seconds, and how likely there is a call at all; None if none was seen at `place`."""
        with self._lock:
            seen = self._seen.get(place)
            return None if seen is None else (seen.pause_s, seen.probability)


@dataclass(slots=True, eq=False)
class Branch:
    """One chain of calls: a run from its beginning, or what one of its forks makes of it."""

    pauses: Pauses
    place: tuple[Hashable, ...]
    """Where in which function it began: the same for all of a fork, and in every run."""
    parent: Branch | None = None
    index: int = 0
    """Of a fork's."""
    n_siblings: int = 1
    """Of the fork, this one included."""
    session_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    is_over: bool = False
    _n_calls: int = 0
    _n_forks: int = 0
    _ended_s: float | None = None
    """When its latest call had its answer, if no other has begun since."""
    _waits_for: Branch | None = None
    """The first one of its latest fork, until it goes on itself."""

    def fork(self, n: int) -> list[Branch]:
        """Its `n` branches, which are about to make calls."""
        self._n_forks += 1
        place = (*self.place, self._n_forks)
        branches = [Branch(self.pauses, place, self, i, n) for i in range(n)]
        self._waits_for = branches[0] if branches else None
        return branches

    def begin(
        self, now_s: float, *, follows: bool | None = None, pause_s: float | None = None
    ) -> dict[str, object]:
        """The hints (docs/slo.md) of a call that is about to be sent.

        follows: whether another call is known to follow; None: that is not known. pause_s: for how
        long the caller says that the chain pauses before the next one; None: it does not say.
        """
        self._went_on(now_s)
        self._n_calls += 1
        said: dict[str, object] = {"session_id": self.session_id}
        if self.parent is not None:
            said["parent_session_id"] = self.parent.session_id
            if self._n_calls == 1 and self.n_siblings > 1:
                said["branches"] = self.n_siblings
        if pause_s is not None:
            said |= {"next_call_in_s": pause_s}
        elif follows:
            said |= {"next_call_in_s": 0.0}
        elif follows is None:
            expected = self.pauses.expected(self._call)
            if expected is not None:
                seconds, probability = expected
                said |= {"next_call_in_s": seconds, "next_call_probability": probability}
        else:
            said |= {"session_final": True, "next_call_in_s": 0.0, "next_call_probability": 0.0}
        return said

    def end(self, now_s: float) -> None:
        """The call has its answer."""
        self._ended_s = now_s

    def close(self) -> None:
        """Nobody adds to it any more. The first branch of a fork is waited for by its parent, whose
        next call goes on from what is shared."""
        if self.is_over:
            return
        self.is_over = True
        is_waited_for = self.parent is not None and self.parent._waits_for is self
        if self._ended_s is not None and not is_waited_for:
            self.pauses.followed(self._call, None)
            self._ended_s = None

    @property
    def _call(self) -> Hashable:
        return self.place, self.index == 0, self._n_calls

    def _went_on(self, now_s: float) -> None:
        joined, self._waits_for = self._waits_for, None
        for chain in (self, joined):
            if chain is not None and chain._ended_s is not None:
                self.pauses.followed(chain._call, max(0.0, now_s - chain._ended_s))
                chain._ended_s = None


def begun(pauses: Pauses, arguments: Sequence[str]) -> Branch:
    """A run that has begun, of a function with arguments of these names."""
    return Branch(pauses, (tuple(arguments),))
