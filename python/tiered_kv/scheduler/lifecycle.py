"""The one owner of requests' lives: which there are, what each is doing, and who hears of it.

| phase | what it means |
|---|---|
| waiting | it is in the queue, for the first time or again; held while its pages are on their way |
| prefilling | its prompt, and what it had produced before, is being computed |
| running | it decodes |
| parked | it runs, but skips this iteration |
| leaving | it gave up its KV, and is not in the queue again |
| over | answered, aborted, or never heard of |

An engine reports what happened, in the order in which it happened, and never what it guesses will
happen. What does not follow from where a request is (`NEXT`) is ignored: an engine may report an
abort twice, or the end of a request that it never queued. Policies hear of each event at once; only
the times of tokens are filled in with the next tick (`date`), since they are not known before.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping

from tiered_kv.forest.node import Node
from tiered_kv.memory.read_order import Urgency
from tiered_kv.scheduler.program_names import ProgramNames
from tiered_kv.scheduler.request import QueuedRequest
from tiered_kv.scheduler.request_policy import Arriving, RequestPolicy
from tiered_kv.scheduler.waiting import WaitingQueue


class Phase(enum.Enum):
    """What a request is doing."""

    WAITING = enum.auto()
    PREFILLING = enum.auto()
    RUNNING = enum.auto()
    PARKED = enum.auto()
    LEAVING = enum.auto()
    OVER = enum.auto()


class Event(enum.Enum):
    """What can happen to it."""

    QUEUED = enum.auto()
    ADMITTED = enum.auto()
    TOKEN = enum.auto()
    """The first one since it was admitted."""
    LEFT = enum.auto()
    ANSWERED = enum.auto()
    ABORTED = enum.auto()


_ALIVE = (Phase.WAITING, Phase.PREFILLING, Phase.RUNNING, Phase.PARKED, Phase.LEAVING)
_ADMITTED = (Phase.PREFILLING, Phase.RUNNING, Phase.PARKED)

NEXT: Mapping[Event, Mapping[Phase, Phase]] = {
    # One that is queued while it runs has left, whether or not that was reported.
    Event.QUEUED: dict.fromkeys((Phase.OVER, Phase.LEAVING, *_ADMITTED), Phase.WAITING),
    Event.ADMITTED: {Phase.WAITING: Phase.PREFILLING},
    Event.TOKEN: {Phase.PREFILLING: Phase.RUNNING},
    Event.LEFT: dict.fromkeys(_ADMITTED, Phase.LEAVING),
    Event.ANSWERED: dict.fromkeys(_ADMITTED, Phase.OVER),
    Event.ABORTED: dict.fromkeys(_ALIVE, Phase.OVER),
}
"""What follows; an event that is not here for a phase is ignored."""


class RequestLives:
    """All requests of one scheduler; keeps its `WaitingQueue` and its policy in step."""

    def __init__(
        self, waiting: WaitingQueue, policy: RequestPolicy, names: ProgramNames | None = None
    ) -> None:
        """names: infers programs that callers do not name; None: nobody does."""
        self.waiting = waiting
        self._names = names
        self.held: dict[int, Arriving] = {}
        """Those who wait, by id, and do not start, because their pages are on their way."""
        self._policy = policy
        self._alive: dict[int, tuple[QueuedRequest, Phase]] = {}
        self._leaving: dict[int, QueuedRequest] = {}
        self._parked: frozenset[int] = frozenset()
        self._undated: list[tuple[Event, QueuedRequest]] = []

    def __len__(self) -> int:
        """Requests that are not over."""
        return len(self._alive)

    def phase(self, request_id: int) -> Phase:
        """Where it is; over if it is not known."""
        _, phase = self._alive.get(request_id, (None, Phase.OVER))
        if phase is Phase.RUNNING and request_id in self._parked:
            return Phase.PARKED
        return phase

    @property
    def wants_time(self) -> bool:
        """Whether anything waits for the next tick: a request, or the time of something."""
        return bool(self.waiting or self._undated or self._leaving)

    @property
    def n_parked(self) -> int:
        """Those who skip the iteration."""
        return len(self._parked)

    # -- what happens -------------------------------------------------------------------------

    def queue(self, request: QueuedRequest, now_s: float) -> bool:
        """It joined the queue, for the first time or again. Returns whether it was not there."""
        if self._follow(Event.QUEUED, request) is None:
            return False
        request.queued_s = now_s
        request.prefilled_tokens = 0
        self.waiting.add(request)
        if self._names is not None:
            self._names.arrived(request)
        self._policy.on_arrival(request, now_s)
        return True

    def admit(self, request: QueuedRequest, now_s: float) -> bool:
        """Its prompt is computed from now on. Returns whether it waited until now."""
        if self._follow(Event.ADMITTED, request) is None:
            return False
        if request.admitted_s is None:
            request.admitted_s = now_s
        self._policy.on_admission(request, now_s)
        return True

    def token(self, request: QueuedRequest) -> bool:
        """Its prompt is computed, which gave a token. Returns whether that is its very first."""
        if self._follow(Event.TOKEN, request) is None or request.first_token_s is not None:
            return False
        self._undated.append((Event.TOKEN, request))
        return True

    def park(self, request_ids: Iterable[int]) -> None:
        """These of those who run skip the iteration; everyone else takes part."""
        self._parked = frozenset(request_ids)

    def leave(self, request: QueuedRequest) -> None:
        """It gave up its KV without having ended: where it goes is still to be seen."""
        self._follow(Event.LEFT, request)

    def answer(self, request: QueuedRequest, now_s: float) -> None:
        """It has its last token."""
        if self._follow(Event.ANSWERED, request) is not None:
            self._undated.append((Event.ANSWERED, request))
            self._policy.on_finish(request, now_s)

    def abort(self, request: QueuedRequest, now_s: float) -> None:
        """It is gone without an answer, wherever it was."""
        if self._follow(Event.ABORTED, request) is not None:
            self._policy.on_abort(request, now_s)

    def _follow(self, event: Event, request: QueuedRequest) -> Phase | None:
        """Where it was before, or None if the event does not follow from that."""
        request_id = request.request_id
        before = self.phase(request_id)
        after = NEXT[event].get(before)
        if after is None:
            return None
        if before is Phase.WAITING:
            self.waiting.remove(request)
            self.held.pop(request_id, None)
        self._leaving.pop(request_id, None)
        if after is Phase.OVER:
            del self._alive[request_id]
            return before
        if after is Phase.LEAVING:
            self._leaving[request_id] = request
        self._alive[request_id] = request, after
        return before

    # -- while they wait ----------------------------------------------------------------------

    def hold(self, request_id: int, arriving: Arriving) -> None:
        """It does not start until `let_go`. Nothing happens to one that does not wait."""
        if self.phase(request_id) is Phase.WAITING:
            self.held[request_id] = arriving

    def let_go(self, request_id: int) -> bool:
        """It may start. Returns whether it was held."""
        return self.held.pop(request_id, None) is not None

    def urgency(self, request_id: int) -> Urgency:
        """By the policy: who of those who wait is read from disk for first."""
        return self._policy.urgency(self.waiting.get(request_id))

    def cached_changed(self, nodes: Iterable[Node], now_s: float) -> None:
        """`nodes` were added or changed tier: what is cached of those who wait may be another."""
        for request in self.waiting.changed(nodes):
            self._policy.on_cached_change(request, now_s)

    def moved(self, roots: Mapping[int, Node], now_s: float) -> None:
        """The trees were emptied; by id, in which tree each of those who wait is looked up now."""
        for request in list(self.waiting):
            self.waiting.remove(request)
            request.root = roots[request.request_id]
            self.waiting.add(request)
            self._policy.on_cached_change(request, now_s)

    # -- time ---------------------------------------------------------------------------------

    def settle(self, now_s: float) -> None:
        """The engine has nothing under way: who left and was not queued again was given up."""
        for request in list(self._leaving.values()):
            self.abort(request, now_s)

    def date(self, now_s: float) -> list[tuple[Event, QueuedRequest]]:
        """A tick: the tokens since the last one came now. Returns what happened, in order."""
        happened = []
        for event, request in self._undated:
            if event is Event.TOKEN:
                if request.first_token_s is not None:
                    continue  # it left and came back between two ticks
                request.first_token_s = now_s
            request.last_token_s = now_s
            happened.append((event, request))
        self._undated.clear()
        return happened
