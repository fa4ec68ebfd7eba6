"""The transfer queue: order, accounting, errors that stop nothing, waiting and closing."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from tiered_kv.tiers.transfer import SingleRank, TransferQueue, Wanted

pytestmark = pytest.mark.timeout(30)

PATIENCE_S = 10.0


@dataclass(frozen=True, eq=False)
class Copy:
    n_pages: int
    name: str = ""


MakeQueue = Callable[[Callable[[Copy], int]], TransferQueue[Copy]]


@pytest.fixture
def make_queue() -> Iterator[MakeQueue]:
    made: list[TransferQueue[Copy]] = []

    def make(run: Callable[[Copy], int]) -> TransferQueue[Copy]:
        made.append(TransferQueue("test", run))
        return made[-1]

    yield make
    for queue in made:
        queue.close()


def all_pages(job: Copy) -> int:
    return job.n_pages


def test_jobs_run_and_complete_in_the_order_of_submission(make_queue: MakeQueue) -> None:
    ran: list[Copy] = []

    def run(job: Copy) -> int:
        ran.append(job)
        return job.n_pages

    queue = make_queue(run)
    jobs = [Copy(n % 3 + 1) for n in range(50)]
    for job in jobs:
        queue.submit(job)
    assert queue.wait(PATIENCE_S)
    assert ran == jobs
    assert queue.n_ready == 50
    completions = queue.acknowledge(20) + queue.acknowledge(30)
    assert [c.job for c in completions] == jobs
    assert [c.n_done for c in completions] == [job.n_pages for job in jobs]
    assert all(c.seconds >= 0 for c in completions)


def test_what_is_in_flight_is_what_is_not_acknowledged(make_queue: MakeQueue) -> None:
    gate = threading.Event()
    queue = make_queue(lambda job: gate.wait(PATIENCE_S) and job.n_pages)
    assert (queue.in_flight, queue.pages_in_flight, queue.n_ready) == (0, 0, 0)
    queue.submit(Copy(3))
    queue.submit(Copy(4))
    assert (queue.in_flight, queue.pages_in_flight, queue.n_ready) == (2, 7, 0)
    gate.set()
    assert queue.wait(PATIENCE_S)
    assert (queue.in_flight, queue.pages_in_flight, queue.n_ready) == (2, 7, 2)
    assert queue.acknowledge(0) == []
    queue.acknowledge(1)
    assert (queue.in_flight, queue.pages_in_flight, queue.n_ready) == (1, 4, 1)
    queue.acknowledge(1)
    assert (queue.in_flight, queue.pages_in_flight, queue.n_ready) == (0, 0, 0)


def test_open_jobs_are_those_in_flight(make_queue: MakeQueue) -> None:
    queue = make_queue(all_pages)
    jobs = [Copy(1), Copy(2), Copy(3)]
    for job in jobs:
        queue.submit(job)
    assert queue.wait(PATIENCE_S)
    assert queue.open_jobs == tuple(jobs)
    queue.acknowledge(2)
    assert queue.open_jobs == (jobs[2],)


def test_what_nobody_wants_any_more_is_over() -> None:
    wanted = Wanted()
    assert not wanted.is_over()
    wanted.until_s = time.monotonic() + 60
    assert not wanted.is_over()
    wanted.until_s = time.monotonic() - 0.001
    assert wanted.is_over()
    assert Wanted(by_anyone=False).is_over()


def test_an_exception_counts_as_no_pages_and_the_next_job_runs(
    make_queue: MakeQueue, caplog: pytest.LogCaptureFixture
) -> None:
    def run(job: Copy) -> int:
        if job.name == "bad":
            raise OSError("no such luck")
        return job.n_pages

    queue = make_queue(run)
    for name in ("bad", "good", "bad", "good"):
        queue.submit(Copy(2, name))
    assert queue.wait(PATIENCE_S)
    assert [c.n_done for c in queue.acknowledge(4)] == [0, 2, 0, 2]
    assert [r.levelname for r in caplog.records] == ["ERROR"] * 2
    assert "no such luck" in caplog.text
    queue.submit(Copy(1))
    assert queue.wait(PATIENCE_S)


def test_wait_gives_up_after_its_time(make_queue: MakeQueue) -> None:
    gate = threading.Event()
    queue = make_queue(lambda job: gate.wait(PATIENCE_S) and job.n_pages)
    assert queue.wait(0.0)  # nothing was submitted
    queue.submit(Copy(1))
    started = time.monotonic()
    assert not queue.wait(0.05)
    assert 0.04 < time.monotonic() - started < PATIENCE_S / 2
    gate.set()
    assert queue.wait()


def test_close_drops_what_has_not_begun(make_queue: MakeQueue) -> None:
    begun, gate = threading.Event(), threading.Event()
    ran: list[str] = []

    def run(job: Copy) -> int:
        ran.append(job.name)
        begun.set()
        gate.wait(PATIENCE_S)
        return job.n_pages

    queue = make_queue(run)
    for name in ("first", "second", "third"):
        queue.submit(Copy(1, name))
    assert begun.wait(PATIENCE_S)
    closing = threading.Thread(target=queue.close)
    closing.start()
    while not queue._is_closing:
        time.sleep(0.001)
    gate.set()
    closing.join(PATIENCE_S)
    assert not closing.is_alive()
    assert ran == ["first"]
    assert [c.n_done for c in queue.acknowledge(queue.n_ready)] == [1, 0, 0]
    assert not any(t.name == "tiered-kv-test" for t in threading.enumerate())


def test_a_finished_job_is_not_kept_alive(make_queue: MakeQueue) -> None:
    """Jobs hold nodes and slots; an idle thread must not keep the last one."""
    queue = make_queue(all_pages)
    job = Copy(1)
    reference = weakref.ref(job)
    queue.submit(job)
    assert queue.wait(PATIENCE_S)
    queue.acknowledge(1)
    del job
    gc.collect()
    assert reference() is None


def test_a_single_rank_agrees_with_itself() -> None:
    assert SingleRank().minimum([3, 0, 7]) == [3, 0, 7]


def test_service_is_what_is_left_of_a_job_without_queueing_and_waiting(
    make_queue: MakeQueue,
) -> None:
    def run(job: Copy) -> int:
        time.sleep(0.05)
        if job.name == "held up":
            time.sleep(0.02)
            queue.exclude(0.05)
        if job.name == "told by a device":
            queue.took(0.02)
        return job.n_pages

    queue = make_queue(run)
    for name in ("plain", "held up", "told by a device", "plain"):
        queue.submit(Copy(1, name))
    assert queue.wait(PATIENCE_S)
    plain, held_up, told, last = queue.acknowledge(4)
    assert plain.service_s >= 0.05
    assert 0.02 <= held_up.service_s <= held_up.seconds - 0.05
    assert 0.02 <= told.service_s <= told.seconds - 0.05
    assert last.seconds >= 0.17
    assert 0.05 <= last.service_s <= last.seconds - 0.12


def test_waiting_for_one_ends_with_the_first_job_that_does(make_queue: MakeQueue) -> None:
    may_end = [threading.Event(), threading.Event()]

    def run(job: Copy) -> int:
        assert may_end[int(job.name)].wait(PATIENCE_S)
        return job.n_pages

    queue = make_queue(run)
    queue.submit(Copy(1, "0"))
    queue.submit(Copy(1, "1"))
    started = time.monotonic()
    queue.wait_for_one(0.05)
    assert queue.n_ready == 0
    assert time.monotonic() - started >= 0.05
    threading.Timer(0.05, may_end[0].set).start()
    queue.wait_for_one(PATIENCE_S)
    assert queue.n_ready == 1
    queue.wait_for_one(PATIENCE_S)  # one is ready still: there is something to do
    assert time.monotonic() - started < PATIENCE_S / 2
    may_end[1].set()
