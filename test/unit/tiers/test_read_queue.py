"""Disk reads by urgency, a stretch at a time, acknowledged one by one."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from tiered_kv.memory.read_turns import READ_STRETCH_PAGES
from tiered_kv.tiers.cold.read_queue import ColdRead, ReadQueue
from tiered_kv.tiers.context import Epoch

pytestmark = pytest.mark.timeout(30)

PATIENCE_S = 10.0
LONG = 3 * READ_STRETCH_PAGES
MakeQueue = Callable[..., ReadQueue]


def read_of(op: int, n_pages: int = 1) -> ColdRead:
    anything: Any = None
    return ColdRead(op, anything, anything, [b""] * n_pages, np.arange(n_pages), Epoch())


class Disk:
    """Remembers the stretches; each waits until it may go on."""

    def __init__(self) -> None:
        self.read: list[tuple[int, int]] = []
        self.gate = threading.Semaphore(0)
        self.begun = threading.Semaphore(0)

    def __call__(self, job: ColdRead, stretch: slice) -> int:
        self.read.append((job.op, stretch.start))
        self.begun.release()
        assert self.gate.acquire(timeout=PATIENCE_S)
        return stretch.stop - stretch.start

    def wait_for_a_stretch(self) -> None:
        assert self.begun.acquire(timeout=PATIENCE_S)


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def queue(disk: Disk) -> Iterator[ReadQueue]:
    queue = ReadQueue("test", disk)
    yield queue
    disk.gate.release(1000)
    queue.close()


def test_equals_are_read_in_the_order_of_submission(queue: ReadQueue, disk: Disk) -> None:
    for op in range(5):
        queue.submit_by(read_of(op), (1.0, 1.0))
    disk.gate.release(5)
    assert queue.wait(PATIENCE_S)
    assert [op for op, _ in disk.read] == [0, 1, 2, 3, 4]
    assert queue.n_ready == queue.in_flight == queue.pages_in_flight == 5


def test_a_more_urgent_read_goes_between_the_stretches_of_another(
    queue: ReadQueue, disk: Disk
) -> None:
    queue.submit_by(read_of(1, LONG), (1.0, 2.0))
    disk.wait_for_a_stretch()
    queue.submit_by(read_of(2, 5), (1.0, 1.0))
    queue.submit_by(read_of(3, 5), (1.0, 3.0))
    disk.gate.release(2)
    queue.wait_for_one(PATIENCE_S)
    assert queue.ready() == [0, 1, 0]
    (short,) = queue.take([0, 1, 0])
    assert (short.job.op, short.n_done) == (2, 5)
    assert (queue.in_flight, queue.pages_in_flight, queue.n_ready) == (2, LONG + 5, 0)
    disk.gate.release(3)
    assert queue.wait(PATIENCE_S)
    assert disk.read == [(1, 0), (2, 0), (1, 64), (1, 128), (3, 0)]
    assert [c.n_done for c in queue.take(queue.everything())] == [LONG, 5]
    assert (queue.in_flight, queue.pages_in_flight) == (0, 0)


def test_ranks_take_only_what_all_have_finished(queue: ReadQueue, disk: Disk) -> None:
    for op in range(3):
        queue.submit_by(read_of(op), (0.0, 0.0))
    disk.gate.release(3)
    assert queue.wait(PATIENCE_S)
    assert [c.job.op for c in queue.take([1, 0, 1])] == [0, 2]
    assert (queue.in_flight, queue.n_ready, queue.ready()) == (1, 1, [1])


def test_a_read_is_hurried(queue: ReadQueue, disk: Disk) -> None:
    queue.submit_by(read_of(0), (0.0, 0.0))
    disk.wait_for_a_stretch()
    for op in (1, 2, 3):
        queue.submit_by(read_of(op), (float(op), 0.0))
    queue.hurry(3, (0.5, 0.0))
    queue.hurry(2, (2.5, 0.0))  # it is more urgent as it is
    disk.gate.release(4)
    assert queue.wait(PATIENCE_S)
    assert [op for op, _ in disk.read] == [0, 3, 1, 2]


def test_what_nobody_wants_ends_after_its_stretch_or_is_not_begun(
    queue: ReadQueue, disk: Disk
) -> None:
    queue.submit_by(read_of(1, LONG), (1.0, 0.0))
    queue.submit_by(read_of(2, LONG), (2.0, 0.0))
    queue.submit_by(read_of(3), (0.0, 0.0) if disk.read else (1.5, 0.0))
    disk.wait_for_a_stretch()
    queue.forget(1)
    queue.forget(2)
    queue.forget(2)
    disk.gate.release(2)
    assert queue.wait(PATIENCE_S)
    assert [c.n_done for c in queue.take(queue.everything())] == [READ_STRETCH_PAGES, 0, 1]


def test_what_is_wanted_again_in_time_is_read_on_in_its_turn(queue: ReadQueue, disk: Disk) -> None:
    queue.submit_by(read_of(0), (0.0, 0.0))
    disk.wait_for_a_stretch()
    queue.submit_by(read_of(1, LONG), (2.0, 0.0))
    queue.submit_by(read_of(2), (1.0, 0.0))
    queue.forget(1)
    queue.hurry(1, (2.0, 0.0))
    disk.gate.release(10)
    assert queue.wait(PATIENCE_S)
    assert [op for op, _ in disk.read] == [0, 2, 1, 1, 1]


def test_pages_before_a_read_are_those_at_least_as_urgent(queue: ReadQueue) -> None:
    queue.submit_by(read_of(1, 10), (1.0, 0.0))
    queue.submit_by(read_of(2, 100), (2.0, 0.0))
    assert [queue.pages_before((n, 0.0)) for n in (0.5, 1.0, 1.5, 2.0)] == [0, 10, 10, 110]


def test_a_short_stretch_and_an_error_end_a_read_and_keep_what_came(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def read(job: ColdRead, stretch: slice) -> int:
        if job.op == 1 and stretch.start:
            raise OSError("no such luck")
        if job.op == 2 and stretch.start:
            return 7
        return stretch.stop - stretch.start

    queue = ReadQueue("test", read)
    for op in (1, 2, 3):
        queue.submit_by(read_of(op, LONG), (0.0, 0.0))
    assert queue.wait(PATIENCE_S)
    assert [c.n_done for c in queue.take(queue.everything())] == [64, 71, LONG]
    assert "no such luck" in caplog.text
    queue.close()


def test_service_is_the_time_of_its_own_stretches(queue: ReadQueue, disk: Disk) -> None:
    spans: list[tuple[int, float, float]] = []
    queue.observe = lambda _, job, start, end, n: spans.append((job.op, start, end))
    queue.submit_by(read_of(1, 2 * READ_STRETCH_PAGES), (1.0, 0.0))
    disk.wait_for_a_stretch()
    queue.submit_by(read_of(2), (0.0, 0.0))
    disk.gate.release()
    disk.wait_for_a_stretch()
    time.sleep(0.1)
    disk.gate.release(2)
    assert queue.wait(PATIENCE_S)
    long, short = queue.take(queue.everything())
    assert short.service_s >= 0.1
    assert long.service_s <= long.seconds - 0.1
    (inner, outer) = spans
    assert (inner[0], outer[0]) == (2, 1)
    assert outer[1] < inner[1] < inner[2] <= outer[2]


def test_close_drops_what_has_not_begun(disk: Disk) -> None:
    queue = ReadQueue("closing", disk)
    for op in range(3):
        queue.submit_by(read_of(op, LONG), (0.0, 0.0))
    disk.wait_for_a_stretch()
    closing = threading.Thread(target=queue.close)
    closing.start()
    while not queue._is_closing:
        time.sleep(0.001)
    disk.gate.release()
    closing.join(PATIENCE_S)
    assert not closing.is_alive()
    assert disk.read == [(0, 0)]
    assert [c.n_done for c in queue.take(queue.everything())] == [READ_STRETCH_PAGES, 0, 0]
    assert not any(t.name == "tiered-kv-closing" for t in threading.enumerate())


def test_a_finished_read_is_not_kept_alive(queue: ReadQueue, disk: Disk) -> None:
    disk.gate.release(10)
    read = read_of(1)
    array = weakref.ref(read.host_pages)
    queue.submit_by(read, (5.0, 0.0))
    queue.hurry(1, (1.0, 0.0))
    assert queue.wait(PATIENCE_S)
    queue.take(queue.everything())
    del read
    deadline = time.monotonic() + PATIENCE_S
    while array() is not None and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert array() is None
