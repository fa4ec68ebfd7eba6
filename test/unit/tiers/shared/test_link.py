"""When a shared store is left alone, and that nobody waits for it longer than was said."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from support_tiers.shared_blobs import SharedBlobs
from tiered_kv.tiers.shared.asker import Asker
from tiered_kv.tiers.shared.link import StoreLink

pytestmark = pytest.mark.timeout(30)


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def link(clock: Clock) -> StoreLink:
    return StoreLink(SharedBlobs(), 2.0, clock)


def fail() -> None:
    raise ConnectionError("no route")


def test_a_question_is_answered_or_given_up() -> None:
    asker, gate = Asker("test"), threading.Event()
    assert asker.ask(lambda: 7, 1.0) == 7
    with pytest.raises(ValueError, match="no"):
        asker.ask(lambda: int("no"), 1.0)
    with pytest.raises(TimeoutError, match=r"no answer within 0\.05 s"):
        asker.ask(gate.wait, 0.05)
    began_s = time.monotonic()
    with pytest.raises(TimeoutError, match="an earlier call"):
        asker.ask(lambda: 7, 10.0)
    assert time.monotonic() - began_s < 1.0
    gate.set()
    deadline = time.monotonic() + 5
    while True:  # The thread that was stuck goes on.
        try:
            assert asker.ask(lambda: 8, 1.0) == 8
            break
        except TimeoutError:
            assert time.monotonic() < deadline


def test_many_ask_at_once() -> None:
    asker, answers = Asker("test"), []
    threads = [
        threading.Thread(target=lambda n=n: answers.append(asker.ask(lambda: n, 5.0)))
        for n in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == list(range(20))


def test_each_way_has_its_own_gate(link: StoreLink, clock: Clock) -> None:
    assert link.write(fail) is None
    assert (link.is_readable, link.is_degraded) == (True, True)
    assert link.read(lambda: 3) == 3
    assert link.ask(lambda: 4) == 4
    assert link.write(lambda: 5) is None
    clock.now_s = 1.0
    assert link.write(lambda: 5) == 5
    assert not link.is_degraded


@pytest.mark.parametrize("way", ["ask", "read"])
def test_what_cannot_be_read_is_not_asked_for(link: StoreLink, clock: Clock, way: str) -> None:
    assert getattr(link, way)(fail) is None
    assert not link.is_readable
    clock.now_s = 1.0
    assert link.is_readable, "one is let through to see"
    assert getattr(link, way)(fail) is None
    clock.now_s = 2.0
    assert not link.is_readable, "the second pause is longer"
    clock.now_s = 3.0
    assert getattr(link, way)(lambda: 1) == 1
    assert link.is_readable


def test_who_hangs_is_an_error_before_he_is_back(
    link: StoreLink, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    inside, gate = threading.Event(), threading.Event()

    def hang() -> int:
        inside.set()
        gate.wait(10)
        return 9

    answers: list[object] = []
    reading = threading.Thread(target=lambda: answers.append(link.read(hang)))
    reading.start()
    inside.wait(10)
    clock.now_s = 1.9
    assert link.is_readable
    clock.now_s = 2.1
    for _ in range(5):
        assert not link.is_readable
        assert link.is_degraded
    assert caplog.text.count("is not read because of an error (no answer within 2 s)") == 1
    clock.now_s = 50.0
    assert not link.is_readable, "it hangs still"
    gate.set()
    reading.join()
    assert answers == [9], "what came is good, however late"
    assert link.read(lambda: 1) == 1
    assert not link.is_degraded
    assert "is read again after" in caplog.text


def test_who_is_late_again_and_again_is_left_alone_for_longer(
    link: StoreLink, clock: Clock
) -> None:
    def slow() -> int:
        clock.now_s += 3.0
        return 1

    pauses = []
    for _ in range(4):
        assert link.read(slow) == 1
        before = clock.now_s
        while not link.is_readable:
            clock.now_s += 0.25
        pauses.append(clock.now_s - before)
    assert pauses == [1.0, 2.0, 4.0, 8.0]


def test_it_counts(link: StoreLink, clock: Clock) -> None:
    def take_half_a_second() -> int:
        clock.now_s += 0.5
        return 1

    link.read(take_half_a_second)
    link.read(take_half_a_second)
    link.ask(lambda: 1)
    link.write(fail)
    stats = link.stats
    assert (stats.calls, stats.failed) == ({"read": 2, "ask": 1}, {"write": 1})
    assert stats.seconds["read"] == 1.0


def test_memory_to_work_with_is_one_callers_at_a_time(link: StoreLink) -> None:
    with link.read_memory.take(10) as first:
        assert len(first) == 10
        taken: list[Callable[[], object]] = []

        def take() -> None:
            with link.read_memory.take(5) as second:
                taken.append(second.tobytes)

        other = threading.Thread(target=take)
        other.start()
        other.join(0.1)
        assert not taken
    other.join(5)
    assert taken
