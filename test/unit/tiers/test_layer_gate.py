"""The gate: nobody reads a layer before it is there, and whose load failed is told so."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from tiered_kv.tiers.layer_gate import LayerGate
from tiered_kv.tiers.streams import Point, Wait

pytestmark = pytest.mark.timeout(30)

N_LAYERS = 4
PATIENCE_S = 10.0
#: Long enough for a thread that does not block to show it.
A_MOMENT_S = 0.05


class Waiter:
    """Calls `wait` on a thread of its own; says whether it has returned, or raised."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self.error: BaseException | None = None
        self._wait = wait
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._wait()
        except BaseException as error:
            self.error = error

    @property
    def is_blocked(self) -> bool:
        self._thread.join(A_MOMENT_S)
        return self._thread.is_alive()

    def join(self) -> None:
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "nobody woke the waiter"


class LayerPoint:
    def __init__(self) -> None:
        self.held_for: list[Wait] = []

    def hold(self, why: Wait) -> None:
        self.held_for.append(why)

    def reached(self, why: Wait) -> None:
        raise AssertionError("a forward pass must not wait on the host")

    def seconds_until(self, later: Point) -> float:
        raise NotImplementedError


def test_wait_blocks_until_the_layer_is_done() -> None:
    gate = LayerGate(N_LAYERS)
    batch = gate.open()
    gate.set_consumer(batch.index)
    batch.layer_done(0)
    gate.wait_until(0)
    waiter = Waiter(lambda: gate.wait_until(2))
    assert waiter.is_blocked
    batch.layer_done(1)
    assert waiter.is_blocked
    batch.layer_done(2)
    waiter.join()
    assert waiter.error is None
    assert not batch.finished
    batch.layer_done(3)
    assert batch.finished
    for layer in range(N_LAYERS):
        gate.wait_until(layer)


def test_many_waiters_wake() -> None:
    batch = LayerGate(N_LAYERS).open()
    waiters = [Waiter(lambda layer=layer: batch.wait(layer)) for layer in range(N_LAYERS)]
    for layer in range(N_LAYERS):
        batch.layer_done(layer)
    for waiter in waiters:
        waiter.join()
        assert waiter.error is None


def test_consumer_minus_one_does_not_wait() -> None:
    gate = LayerGate(N_LAYERS)
    gate.wait_until(0)  # nobody ever called set_consumer
    gate.set_consumer(gate.open().index)
    gate.set_consumer(-1)
    started = time.monotonic()
    gate.wait_until(N_LAYERS - 1)
    assert time.monotonic() - started < 1.0


def test_the_loads_still_open_newest_first() -> None:
    gate = LayerGate(N_LAYERS)
    first, second, third = gate.open(), gate.open(), gate.open()
    assert len({first.index, second.index, third.index}) == 3
    assert list(gate.newest_first()) == [third, second, first]
    gate.close(second)
    gate.close(second)
    assert list(gate.newest_first()) == [third, first]
    assert gate.open().index > third.index


def test_a_load_closed_before_its_consumer_runs_needs_no_wait() -> None:
    """The poll between forming a batch and running it may acknowledge the load."""
    gate = LayerGate(N_LAYERS)
    batch = gate.open()
    for layer in range(N_LAYERS):
        batch.layer_done(layer)
    gate.close(batch)
    gate.set_consumer(batch.index)
    gate.wait_until(N_LAYERS - 1)


def test_a_consumer_that_already_waits_is_not_let_through_by_close() -> None:
    gate = LayerGate(N_LAYERS)
    batch = gate.open()
    gate.set_consumer(batch.index)
    gate.close(batch)
    waiter = Waiter(lambda: gate.wait_until(0))
    assert waiter.is_blocked
    batch.layer_done(0)
    waiter.join()


def test_a_load_that_fails_lets_its_waiter_go() -> None:
    gate = LayerGate(N_LAYERS)
    batch = gate.open()
    point = LayerPoint()
    gate.set_consumer(batch.index)
    batch.layer_done(0, point)
    waiter = Waiter(lambda: gate.wait_until(1))
    assert waiter.is_blocked
    batch.fail()
    waiter.join()
    assert waiter.error is None
    for layer in range(N_LAYERS):
        gate.wait_until(layer)
    assert not point.held_for
    assert gate.has_failed(batch.index)


def test_who_waited_for_a_load_counts_on_those_before_it() -> None:
    gate = LayerGate(N_LAYERS)
    first, second, third = gate.open(), gate.open(), gate.open()
    second.fail()
    assert not gate.has_failed(-1)
    assert not gate.has_failed(first.index)
    assert gate.has_failed(second.index)
    gate.close(third)  # though it is over before its consumer runs
    assert gate.has_failed(third.index)
    gate.close(second)
    assert not gate.has_failed(third.index)
    assert list(gate.newest_first()) == [first]


def test_a_layer_waits_for_its_point_in_the_stream_that_runs_it() -> None:
    gate = LayerGate(N_LAYERS)
    batch = gate.open()
    assert batch.whole is None
    points = [LayerPoint() for _ in range(N_LAYERS)]
    for layer, point in enumerate(points):
        batch.layer_done(layer, point)
    assert batch.whole is points[-1]
    gate.set_consumer(batch.index)
    gate.wait_until(1)
    gate.wait_until(3)
    held = [point.held_for for point in points]
    assert held == [[], [Wait.LAYER_FOR_LOAD], [], [Wait.LAYER_FOR_LOAD]]
    batch.fail()
    assert batch.whole is None
