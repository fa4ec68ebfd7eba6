"""The owner of requests' lives: what follows from each phase, and who hears of it.

Guarantee: an event that does not follow changes nothing; policies hear of each event once, at once,
in order; times come with the next tick; nobody who is over stays known.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable

import pytest

from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.key import namespace_hash
from tiered_kv.scheduler.lifecycle import NEXT, Event, Phase, RequestLives
from tiered_kv.scheduler.request import QueuedRequest
from tiered_kv.scheduler.request_policy import Arriving, QuietPolicy
from tiered_kv.scheduler.waiting import WaitingQueue


class Spy(QuietPolicy):
    def __init__(self) -> None:
        self.heard: list[tuple[str, int, float]] = []

    def on_arrival(self, request: QueuedRequest, now_s: float) -> None:
        self.heard.append(("arrival", request.request_id, now_s))

    def on_cached_change(self, request: QueuedRequest, now_s: float) -> None:
        self.heard.append(("change", request.request_id, now_s))

    def on_admission(self, request: QueuedRequest, now_s: float) -> None:
        self.heard.append(("admission", request.request_id, now_s))

    def on_finish(self, request: QueuedRequest, now_s: float) -> None:
        self.heard.append(("finish", request.request_id, now_s))

    def on_abort(self, request: QueuedRequest, now_s: float) -> None:
        self.heard.append(("abort", request.request_id, now_s))


class Server:
    """Lives over a forest, a policy that listens, and one request that nobody has heard of."""

    def __init__(self) -> None:
        self.forest = Forest(1)
        self.root = self.forest.root(namespace_hash("lives"))
        self.spy = Spy()
        self.lives = RequestLives(WaitingQueue(self.forest), self.spy)
        self.one = self.request(1)

    def request(self, request_id: int) -> QueuedRequest:
        return QueuedRequest(request_id, 0.0, self.root, array("q", [1, 2, 3, 4]), 4, 8)

    def happens(self, event: Event, now_s: float = 5.0) -> None:
        lives, one = self.lives, self.one
        does: dict[Event, Callable[[], object]] = {
            Event.QUEUED: lambda: lives.queue(one, now_s),
            Event.ADMITTED: lambda: lives.admit(one, now_s),
            Event.TOKEN: lambda: lives.token(one),
            Event.LEFT: lambda: lives.leave(one),
            Event.ANSWERED: lambda: lives.answer(one, now_s),
            Event.ABORTED: lambda: lives.abort(one, now_s),
        }
        does[event]()

    def bring_to(self, phase: Phase) -> None:
        for event in WAYS[phase]:
            self.happens(event, 1.0)
        if phase is Phase.PARKED:
            self.lives.park([1])
        assert self.lives.phase(1) is phase


WAYS = {
    Phase.OVER: (),
    Phase.WAITING: (Event.QUEUED,),
    Phase.PREFILLING: (Event.QUEUED, Event.ADMITTED),
    Phase.RUNNING: (Event.QUEUED, Event.ADMITTED, Event.TOKEN),
    Phase.PARKED: (Event.QUEUED, Event.ADMITTED, Event.TOKEN),
    Phase.LEAVING: (Event.QUEUED, Event.ADMITTED, Event.LEFT),
}


#: What follows, by phase and event; "." where nothing does.
TABLE = """
            queued      admitted    token       left        answered    aborted
over        waiting     .           .           .           .           .
waiting     .           prefilling  .           .           .           over
prefilling  waiting     .           running     leaving     over        over
running     waiting     .           .           leaving     over        over
parked      waiting     .           .           leaving     over        over
leaving     waiting     .           .           .           .           over
"""


def table() -> dict[tuple[Event, Phase], Phase | None]:
    head, *rows = (line.split() for line in TABLE.strip().splitlines())
    return {
        (Event[event.upper()], Phase[phase.upper()]): None if to == "." else Phase[to.upper()]
        for phase, *cells in rows
        for event, to in zip(head, cells, strict=True)
    }


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("event", Event)
def test_every_event_in_every_phase(server: Server, phase: Phase, event: Event) -> None:
    server.bring_to(phase)
    heard = len(server.spy.heard)
    server.happens(event)
    after = table()[event, phase]
    assert NEXT[event].get(phase) is after
    lives = server.lives
    assert lives.phase(1) is (phase if after is None else after)
    assert (1 in lives.waiting.requests) == (lives.phase(1) is Phase.WAITING)
    assert len(lives) == (lives.phase(1) is not Phase.OVER)
    is_told = after is not None and event not in {Event.TOKEN, Event.LEFT}
    assert len(server.spy.heard) - heard == is_told


def test_who_was_aborted_and_queued_again_before_the_tick_waits(server: Server) -> None:
    """The order that two lists lost: it was told as aborted after it had come back."""
    server.bring_to(Phase.RUNNING)
    for event in (Event.LEFT, Event.QUEUED):
        server.happens(event)
    server.lives.settle(6.0)
    server.lives.date(6.0)
    assert [what for what, _, _ in server.spy.heard] == ["arrival", "admission", "arrival"]
    assert server.lives.phase(1) is Phase.WAITING


def test_who_left_and_did_not_come_back_is_over(server: Server) -> None:
    server.bring_to(Phase.LEAVING)
    assert server.lives.wants_time
    server.lives.settle(7.0)
    assert server.spy.heard[-1] == ("abort", 1, 7.0)
    assert not server.lives.wants_time


def test_times_come_with_the_next_tick(server: Server) -> None:
    server.bring_to(Phase.PREFILLING)
    lives, one = server.lives, server.one
    assert lives.token(one)
    assert (one.admitted_s, one.first_token_s, lives.wants_time) == (1.0, None, True)
    assert lives.date(2.0) == [(Event.TOKEN, one)]
    assert (one.first_token_s, one.last_token_s) == (2.0, 2.0)
    for event in (Event.LEFT, Event.QUEUED, Event.ADMITTED):
        server.happens(event, 3.0)
    assert not lives.token(one), "only the very first has a time"
    server.happens(Event.ANSWERED, 3.0)
    assert lives.date(4.0) == [(Event.ANSWERED, one)]
    assert (one.admitted_s, one.first_token_s, one.last_token_s) == (1.0, 2.0, 4.0)
    assert lives.date(5.0) == []


def test_a_first_token_has_one_time_though_it_left_and_came_back_before_the_tick(
    server: Server,
) -> None:
    server.bring_to(Phase.RUNNING)
    for event in (Event.LEFT, Event.QUEUED, Event.ADMITTED, Event.TOKEN):
        server.happens(event)
    assert server.lives.date(9.0) == [(Event.TOKEN, server.one)]


def test_only_who_waits_is_held(server: Server) -> None:
    lives = server.lives
    lives.hold(1, Arriving(1.0, 64))
    assert not lives.held
    server.bring_to(Phase.WAITING)
    lives.hold(1, Arriving(1.0, 64))
    assert set(lives.held) == {1}
    server.happens(Event.ABORTED)
    assert not lives.held
    server.happens(Event.QUEUED)
    lives.hold(1, Arriving(1.0, 64))
    lives.let_go(1)
    assert not lives.held


def test_who_is_parked_takes_part_again(server: Server) -> None:
    server.bring_to(Phase.PARKED)
    server.lives.park([])
    assert server.lives.phase(1) is Phase.RUNNING
    server.lives.park([7])
    assert server.lives.phase(7) is Phase.OVER, "nobody has heard of it"


def test_what_becomes_cached_is_told_of_those_who_wait(server: Server) -> None:
    server.bring_to(Phase.WAITING)
    tokens = server.one.tokens
    added = server.forest.insert(server.root, tokens, range(4), tier=Tier.DEVICE).adopted
    server.lives.cached_changed(added, 2.0)
    assert server.spy.heard[-1] == ("change", 1, 2.0)
    assert server.one.device_tokens == 3
    other = server.forest.root(namespace_hash("other weights"))
    server.lives.moved({1: other}, 3.0)
    assert server.spy.heard[-1] == ("change", 1, 3.0)
    assert (server.one.root, server.one.device_tokens) == (other, 0)
    server.happens(Event.ADMITTED)
    server.lives.cached_changed(added, 4.0)
    assert server.spy.heard[-1][0] == "admission"
