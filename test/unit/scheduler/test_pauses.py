"""How long a program pauses is learned by what it paused for, and forgotten where nobody comes."""

from __future__ import annotations

from array import array
from collections.abc import Hashable

import pytest

from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.key import namespace_hash
from tiered_kv.scheduler import pauses as learned
from tiered_kv.scheduler.next_calls import GRACE_S
from tiered_kv.scheduler.pauses import LEAST, NEVER_S, LearnedPauses, Pause
from tiered_kv.scheduler.request import QueuedRequest

ROOT = Forest(page_size=1, tiers=(Tier.DEVICE,)).root(namespace_hash("pauses"))
TOOL, PERSON = ("tool",), ("person",)


class Callers:
    """Programs that call, are answered at once, and pause."""

    def __init__(self) -> None:
        self.pauses = LearnedPauses()
        self.now_s = 0.0
        self._n = 0

    def call(
        self, program: str, ending: Hashable, pause_s: float, tool: str = "", tenant: str = ""
    ) -> Pause | None:
        """What is foretold when it is answered; then the time until it comes again passes."""
        self._n += 1
        request = QueuedRequest(
            self._n, self.now_s, ROOT, array("q"), 1, 1, program=program, tool=tool, tenant=tenant
        )
        self.pauses.arrived(request, self.now_s)
        found = self.pauses.ended(request, ending, self.now_s)
        self.now_s += pause_s
        return found

    def teach(self, program: str, ending: Hashable, pause_s: float, **words: str) -> None:
        for _ in range(LEAST + 1):
            self.call(program, ending, pause_s, **words)


@pytest.fixture
def callers() -> Callers:
    return Callers()


def about(seconds: float) -> object:
    return pytest.approx(seconds, rel=0.5)


def test_nothing_is_foretold_before_enough_was_seen(callers: Callers) -> None:
    found = [callers.call("a", TOOL, 5.0) for _ in range(LEAST + 2)]
    assert found[:LEAST] == [None] * LEAST
    assert found[-1] is not None
    assert found[-1].in_s == about(5.0)
    assert found[-1].probability > 0.8


def test_how_an_answer_ended_tells_for_whom_it_was(callers: Callers) -> None:
    callers.teach("a", TOOL, 5.0)
    callers.teach("b", PERSON, 120.0)
    tool, person = callers.call("new", TOOL, 5.0), callers.call("new", PERSON, 120.0)
    assert tool is not None
    assert person is not None
    assert (tool.in_s, person.in_s) == (about(5.0), about(120.0))


def test_tools_that_callers_name_are_told_apart(callers: Callers) -> None:
    callers.teach("a", TOOL, 2.0, tool="read")
    callers.teach("b", TOOL, 60.0, tool="test")
    found = callers.call("new", TOOL, 0.0, tool="test")
    assert found is not None
    assert found.in_s == about(60.0)


def test_what_nobody_names_is_as_the_program_s_own_pauses_were(callers: Callers) -> None:
    callers.teach("a", None, 2.0)
    callers.teach("b", None, 60.0)
    for program, pause_s in (("a", 2.0), ("b", 60.0)):
        found = callers.call(program, None, pause_s)
        assert found is not None
        assert found.in_s == about(pause_s)


def test_of_tenants_who_name_tools_alike_each_has_its_own(callers: Callers) -> None:
    callers.teach("a", TOOL, 2.0, tool="read", tenant="one")
    callers.teach("b", TOOL, 60.0, tool="read", tenant="two")
    found = callers.call("new", TOOL, 0.0, tool="read", tenant="one")
    assert found is not None
    assert found.in_s == about(2.0)


def test_where_programs_mostly_end_nothing_is_foretold(callers: Callers) -> None:
    callers.teach("a", TOOL, 5.0)
    for number in range(4 * LEAST):
        callers.call(f"once {number}", PERSON, 1.0)
    callers.now_s += learned.LATE_S
    assert callers.call("new", PERSON, 0.0) is None, "they are late"
    callers.now_s += NEVER_S
    assert callers.call("new", PERSON, 0.0) is None
    found = callers.call("other", TOOL, 0.0)
    assert found is not None, "of the others it says nothing"


def test_the_old_is_forgotten(callers: Callers) -> None:
    for _ in range(4 * learned.PAUSES_HALF):
        callers.call("a", TOOL, 100.0)
    for _ in range(4 * learned.PAUSES_HALF):
        found = callers.call("a", TOOL, 1.0)
    assert found is not None
    assert found.in_s == about(1.0)


def test_pauses_within_the_wait_count_as_sure_ones(callers: Callers) -> None:
    for index in range(4 * LEAST):
        found = callers.call("a", TOOL, 2.0 if index % 4 else 50.0 * GRACE_S)
    assert found is not None
    assert found.probability == pytest.approx(0.75, abs=0.1)


def test_invented_names_take_nobody_s_place(
    callers: Callers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learned, "NAMES_MAX", 16)
    monkeypatch.setattr(learned, "PROGRAMS_MAX", 32)
    callers.teach("a", TOOL, 5.0, tool="read")
    for number in range(1000):
        callers.call(f"p{number}", None, 0.001, tool=f"tool {number}")
        assert len(callers.pauses) <= 16 + 3 * 32 + 1
    found = callers.call("new", TOOL, 0.0, tool="read")
    assert found is not None
    assert found.in_s == about(5.0)
    callers.now_s += 2 * learned.NAME_QUIET_S
    callers.teach("b", PERSON, 60.0, tool="late")
    found = callers.call("newer", PERSON, 0.0, tool="late")
    assert found is not None, "names that nobody used for long make way"
    assert found.in_s == about(60.0)


def test_the_last_call_of_a_program_is_the_last(callers: Callers) -> None:
    callers.teach("a", TOOL, 5.0)
    last = QueuedRequest(10**6, 0.0, ROOT, array("q"), 1, 1, program="a", is_last_call=True)
    callers.pauses.arrived(last, callers.now_s)
    assert callers.pauses.ended(last, TOOL, callers.now_s) is None
