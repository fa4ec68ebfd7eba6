"""When writes are tried again after a failure, and what has a say in it."""

from __future__ import annotations

import errno

from tiered_kv.tiers.disk.write_gate import WriteGate
from tiered_kv.tiers.gate import LONGEST_PAUSE_S, Admission

BROKEN = OSError(errno.EIO, "broken")


class Time:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def closed_gate() -> tuple[WriteGate, Time]:
    """It may be tried at 1 s."""
    clock = Time()
    gate = WriteGate("here", clock)
    gate.fail(Admission.CALL, BROKEN)
    assert gate.is_degraded
    return gate, clock


def test_pauses_grow_to_a_minute() -> None:
    gate, clock = closed_gate()
    pauses = []
    for _ in range(9):
        started = clock.now_s
        while (admission := gate.try_enter()) is None:
            clock.now_s += 0.5
        pauses.append(clock.now_s - started)
        gate.fail(admission, BROKEN)
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, *[LONGEST_PAUSE_S] * 3]


def test_one_probe_is_let_through_at_a_time() -> None:
    gate, clock = closed_gate()
    assert not gate.try_enter()
    clock.now_s = 1.0
    assert [gate.try_enter() for _ in range(3)] == [Admission.PROBE, None, None]
    gate.fail(Admission.PROBE, BROKEN)
    clock.now_s = 2.9
    assert not gate.try_enter()
    clock.now_s = 3.0
    assert gate.try_enter() is Admission.PROBE
    gate.succeed(Admission.PROBE)
    assert [gate.try_enter() for _ in range(3)] == [Admission.CALL] * 3


def test_only_the_probe_has_a_say_while_the_gate_is_closed() -> None:
    """Writes that were let in before the failure may end at any time, one way or the other."""
    gate, clock = closed_gate()
    gate.succeed(Admission.CALL)
    clock.now_s = 0.9
    gate.fail(Admission.CALL, BROKEN)
    assert gate.is_degraded
    clock.now_s = 1.0
    assert gate.try_enter() is Admission.PROBE, "late failures make the pause no longer"
    gate.fail(Admission.CALL, BROKEN)
    gate.succeed(Admission.CALL)
    assert gate.is_degraded
    assert not gate.try_enter(), "the probe is still under way"
    gate.succeed(Admission.PROBE)
    assert not gate.is_degraded


def test_a_probe_that_comes_to_nothing_is_followed_by_another_at_once() -> None:
    gate, clock = closed_gate()
    clock.now_s = 1.0
    assert gate.try_enter() is Admission.PROBE
    gate.leave(Admission.PROBE)
    assert gate.is_degraded
    assert gate.try_enter() is Admission.PROBE
    gate.fail(Admission.PROBE, BROKEN)
    assert not gate.try_enter()
    clock.now_s = 3.0
    assert gate.try_enter() is Admission.PROBE, "the pause is as long as if it had not been"


def test_a_read_only_store_is_never_written() -> None:
    gate = WriteGate("here", Time(), read_only=True)
    assert gate.is_degraded
    assert not gate.try_enter()
