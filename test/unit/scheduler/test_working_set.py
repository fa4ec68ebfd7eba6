"""Programs pause while the contexts of others fill the memory, and no others do."""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass, field
from typing import Any

import pytest

from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.key import namespace_hash
from tiered_kv.scheduler.programs import Program, Programs
from tiered_kv.scheduler.request import QueuedRequest
from tiered_kv.scheduler.working_set import HALF_LIFE_S, PAUSED_LOOK, PLACE_S, WorkingSet

ROOT = Forest(page_size=1, tiers=(Tier.DEVICE,)).root(namespace_hash("sets"))
POOL = 1000


@dataclass
class _State:
    """What of a `SchedulerState` is looked at."""

    now_s: float
    running: list[QueuedRequest] = field(default_factory=list)
    available_tokens: int | None = POOL
    decode_context_tokens: int = 0
    host_tokens: int = 0
    unfinished: None = None


class Machine:
    """Programs that call; memory is `POOL` tokens."""

    def __init__(self) -> None:
        self.set, self.programs = WorkingSet(), Programs()
        self.now_s = 0.0
        self.waiting: dict[int, QueuedRequest] = {}
        self.running: dict[int, QueuedRequest] = {}
        self._n = 0

    def arrive(self, name: str, tokens: int, **what: Any) -> int:
        self._n += 1
        request = QueuedRequest(
            self._n, self.now_s, ROOT, array("q"), tokens, 1, program=name, **what
        )
        self.waiting[self._n] = request
        program, _ = self.programs.arrived(request, self.now_s)
        self.set.arrived(request, program, self.now_s)
        return self._n

    def admit(self, request_id: int) -> None:
        request = self.running[request_id] = self.waiting.pop(request_id)
        self.programs.admitted(request, self.now_s)
        self.set.admitted(request, self.programs.of(request), self.now_s)

    def end(self, request_id: int, output_tokens: int = 0) -> None:
        request = self.running.pop(request_id, None) or self.waiting.pop(request_id)
        request.output_tokens = output_tokens
        program = self.programs.ended(request, self.now_s)
        assert program is not None
        self.set.ended(request, program, self.now_s)

    def call(self, name: str, tokens: int, **what: Any) -> None:
        request_id = self.arrive(name, tokens, **what)
        self.admit(request_id)
        self.end(request_id)

    def order(self, **state: Any) -> list[int]:
        """Those who wait, by arrival, without those that pause."""
        self.set.plan(_State(self.now_s, list(self.running.values()), **state))  # type: ignore[arg-type]

        def of(request_id: int) -> tuple[Program, int]:
            request = self.waiting[request_id]
            return self.programs.of(request), request.prompt_tokens - request.device_tokens

        return list(self.set.unpaused(iter(self.waiting), of, float))

    def teach(self) -> None:
        """Programs come back."""
        for _ in range(50):
            self.call("teacher", 1)
        self.now_s += 2 * PLACE_S


@pytest.fixture
def machine() -> Machine:
    made = Machine()
    made.teach()
    return made


def test_who_is_in_progress_goes_on_and_others_pause(machine: Machine) -> None:
    machine.call("a", 600)
    machine.admit(machine.arrive("b", 300))
    new, again, small = machine.arrive("c", 500), machine.arrive("a", 700), machine.arrive("d", 50)
    assert machine.order() == [again, small]
    assert new not in machine.order()


def test_after_long_at_its_tool_a_program_has_lost_its_place(machine: Machine) -> None:
    machine.call("a", 900)
    machine.admit(machine.arrive("running", 10))
    new = machine.arrive("b", 500)
    assert machine.order() == []
    machine.now_s += HALF_LIFE_S
    assert machine.order() == [new], "it counts half by now"
    machine.now_s += PLACE_S
    machine.admit(new)
    back = machine.arrive("a", 900)
    assert machine.order() == []
    machine.end(new)
    machine.now_s += PLACE_S
    assert machine.order() == [back]


def test_the_device_does_not_rest_for_those_who_are_away(machine: Machine) -> None:
    machine.call("a", 1000)
    first, _ = machine.arrive("b", 900), machine.arrive("c", 900)
    assert machine.order() == [first]


def test_what_the_host_holds_need_not_fit_the_device(machine: Machine) -> None:
    machine.call("a", 900)
    machine.admit(machine.arrive("running", 10))
    new = machine.arrive("b", 900)
    assert machine.order(host_tokens=POOL) == []
    assert machine.order(host_tokens=2 * POOL) == [new]


def test_nothing_is_kept_free_for_programs_of_one_call() -> None:
    machine = Machine()
    for number in range(100):
        machine.call(f"once {number}", 100)
    machine.admit(machine.arrive("running", 10))
    new = machine.arrive("b", 900)
    assert machine.order() == [new]


def test_who_says_that_it_is_the_last_call_keeps_nothing(machine: Machine) -> None:
    machine.call("a", 900, is_last_call=True)
    machine.admit(machine.arrive("running", 10))
    new = machine.arrive("b", 900)
    assert machine.order() == [new]


def test_what_is_shared_counts_once(machine: Machine) -> None:
    machine.admit(machine.arrive("a", 800))
    for number in range(10):
        machine.admit(machine.arrive(f"b{number}", 810, device_tokens=800))
    new = machine.arrive("c", 850, device_tokens=800)
    assert machine.order() == [new]


def test_work_is_bounded_and_programs_in_progress_are_found_behind_many(machine: Machine) -> None:
    machine.call("a", 990)
    machine.admit(machine.arrive("running", 10))
    for number in range(2000):
        machine.arrive(f"new {number}", 500)
    again = machine.arrive("a", 995)
    asked = []
    pauses = machine.set.pauses
    machine.set.pauses = lambda *of: asked.append(of) or pauses(*of)  # type: ignore[method-assign, func-returns-value]
    assert machine.order() == [again]
    assert len(asked) == PAUSED_LOOK


def test_without_knowing_the_pool_nobody_pauses(machine: Machine) -> None:
    machine.call("a", 10**6)
    new = machine.arrive("b", 10**6)
    assert machine.order(available_tokens=None) == [new]


@pytest.mark.parametrize("seed", range(20))
def test_the_books_are_right_after_any_history(seed: int) -> None:
    rand, machine = random.Random(seed), Machine()
    for _ in range(400):
        deed = rand.random()
        if deed < 0.4:
            machine.arrive(rand.choice("abcdefgh") + rand.choice("12"), rand.randrange(1, 500))
        elif deed < 0.65 and machine.waiting:
            machine.admit(rand.choice(list(machine.waiting)))
        elif deed < 0.9 and machine.running:
            machine.end(rand.choice(list(machine.running)), rand.randrange(100))
        elif machine.waiting:
            machine.end(rand.choice(list(machine.waiting)))
        machine.now_s += rand.choice((0.0, 1.0, 30.0, PLACE_S))
        machine.order()
        check(machine.set, machine)


def check(found: WorkingSet, machine: Machine) -> None:
    places = found._places.values()
    assert found._open_tokens == sum(place.tokens for place in places if not place.is_away)
    away = sum(
        place.counted * 0.5 ** ((machine.now_s - place.since_s) / HALF_LIFE_S)
        for place in places
        if place.is_away
    )
    assert found._away_tokens == pytest.approx(away, abs=1e-6)
    assert set(found._away.values()) == {place for place in places if place.is_away}
    in_progress = {
        request_id
        for request_id, request in machine.waiting.items()
        if machine.programs.of(request) in found._places
    }
    assert set(found._ready) == in_progress
    assert {i for ids in found._waiting.values() for i in ids} == set(machine.waiting)
