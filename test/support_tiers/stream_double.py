"""A device whose streams do their work in any order that their waits allow, with real bytes.

What is asked of a stream is done later, or never before somebody blocks on it: a schedule says
which stream moves next, whenever the host does something. Threads take part as streams do: only one
runs at a time, and the schedule says which. So a run is determined by its schedule, and a wait that
is missing shows as bytes that are wrong under some schedule. A wait can be left out by its name.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from tiered_kv.tiers.slots import PageIds
from tiered_kv.tiers.streams import CopyStreams, Point, Wait
from tiered_kv.tiers.transfer import Job, TransferQueue

PATIENCE_S = 20.0


class StuckError(AssertionError):
    """Somebody waits for what will never be."""


class Schedule(Protocol):
    def choose(self, ready: Sequence[str], *, forced: bool) -> str | None:
        """Who of `ready` moves next; None: nobody, for now, which cannot be said if `forced`."""


class Eager:
    """Everything is done as soon as it is asked for: copies that are not asynchronous."""

    def choose(self, ready: Sequence[str], *, forced: bool) -> str | None:
        del forced
        return ready[0]


@dataclass
class Stalled:
    """Whoever is in `stalled` moves only when somebody blocks, and nobody else can move."""

    stalled: frozenset[str]
    order: tuple[str, ...]

    def choose(self, ready: Sequence[str], *, forced: bool) -> str | None:
        willing = [name for name in self.order if name in ready and name not in self.stalled]
        if not willing and forced:
            willing = [name for name in self.order if name in ready]
        return willing[0] if willing else None


class Random:
    """Some move often and some seldom, as the seed has it."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._stops = self._rng.choice((0.05, 0.3, 0.6, 0.9))
        self._speed: dict[str, float] = {}

    def choose(self, ready: Sequence[str], *, forced: bool) -> str | None:
        rng = self._rng
        if not forced and rng.random() < self._stops:
            return None
        speeds = [self._speed.setdefault(name, 0.02 + rng.random() ** 3) for name in ready]
        return rng.choices(ready, speeds)[0]


@dataclass(frozen=True)
class Removed:
    """A wait that is left out; of: only for points of this stream."""

    why: Wait
    of: str | None = None

    def covers(self, why: Wait, stream: str) -> bool:
        return why is self.why and self.of in (None, stream)

    def __str__(self) -> str:
        return self.why.value + ("" if self.of is None else f" ({self.of} stream)")


@dataclass(eq=False)
class DoublePoint:
    stream: DoubleStream
    at: int | None = None
    """By the device's clock; None until the stream has come to it."""

    @property
    def is_reached(self) -> bool:
        return self.at is not None

    def hold(self, why: Wait) -> None:
        self.stream.device.current.wait(self, why)

    def reached(self, why: Wait) -> None:
        device = self.stream.device
        if not device.is_removed(why, self.stream.name):
            device.block(lambda: self.is_reached)

    def seconds_until(self, later: Point) -> float:
        assert isinstance(later, DoublePoint)
        return ((later.at or 0) - (self.at or 0)) * 1e-6


@dataclass(eq=False)
class DoubleStream:
    """See `tiered_kv.tiers.streams.Stream`."""

    device: Device
    name: str
    _asked: deque[DoublePoint | Callable[[], object]] = field(default_factory=deque)
    _awaited: dict[int, DoublePoint] = field(default_factory=dict)
    _n_asked: int = 0
    _n_done: int = 0

    def record(self, *, timed: bool = False) -> DoublePoint:
        del timed
        point = DoublePoint(self)
        self._ask(point)
        return point

    def wait(self, point: Point, why: Wait) -> None:
        assert isinstance(point, DoublePoint)
        if not self.device.is_removed(why, point.stream.name):
            self.follow(point)

    def follow(self, point: DoublePoint) -> None:
        """A wait that is not ours to leave out: the engine's own."""
        self._ask(lambda: None, point)

    def run(self, kernel: Callable[[], object]) -> None:
        self.device.may_fail(self.name)
        self._ask(kernel)

    def empty(self, n: int) -> torch.Tensor:
        return torch.zeros(n, dtype=torch.int64)

    def upload(self, ids: PageIds) -> torch.Tensor:
        now, later = torch.from_numpy(ids.copy()), self.empty(len(ids))
        self._ask(lambda: later.copy_(now))
        return later

    def copy_rows(self, target: torch.Tensor, source: torch.Tensor) -> None:
        assert target.shape == source.shape
        self.device.may_fail(self.name)
        self._ask(lambda: target.copy_(source))

    def _ask(
        self, what: DoublePoint | Callable[[], object], after: DoublePoint | None = None
    ) -> None:
        if after is not None:
            self._awaited[self._n_asked] = after
        self._n_asked += 1
        self._asked.append(what)
        self.device.breathe()

    @property
    def is_ready(self) -> bool:
        if not self._asked:
            return False
        awaited = self._awaited.get(self._n_done)
        return awaited is None or awaited.is_reached

    def move(self) -> None:
        """Does the next thing, and comes to the points behind it."""
        self._awaited.pop(self._n_done, None)
        self._do(self._asked.popleft())
        while self._asked and isinstance(self._asked[0], DoublePoint):
            self._do(self._asked.popleft())

    def _do(self, what: DoublePoint | Callable[[], object]) -> None:
        self._n_done += 1
        if isinstance(what, DoublePoint):
            what.at = self.device.tick()
        else:
            what()


class Worker:
    """A thread that runs only when it is its turn."""

    def __init__(self, device: Device, name: str, work: Callable[[], None]) -> None:
        self.name = name
        self._device = device
        self._work = work
        self._goes_on_if: Callable[[], bool] = lambda: True
        self._turn = threading.Semaphore(0)
        self.is_over = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        return not self.is_over and self._goes_on_if()

    def move(self) -> None:
        """By the host's thread: lets it run until it pauses."""
        self._turn.release()
        assert self._device.turn.acquire(timeout=PATIENCE_S)

    def pause(self, goes_on_if: Callable[[], bool] = lambda: True) -> None:
        """By itself."""
        self._goes_on_if = goes_on_if
        self._device.turn.release()
        assert self._turn.acquire(timeout=PATIENCE_S)

    def _run(self) -> None:
        self._turn.acquire()
        self._device.workers_by_thread[threading.get_ident()] = self
        try:
            self._work()
        except BaseException as error:
            self._device.errors.append(error)
        self.is_over = True
        self._device.turn.release()


class Device:
    """Streams `schedule`, `forward`, `to-host` and `to-device`, and the threads that copy."""

    def __init__(self, schedule: Schedule, removed: Removed | None = None) -> None:
        names = ("schedule", "forward", "to-host", "to-device")
        self.streams = {name: DoubleStream(self, name) for name in names}
        self.current = self.streams["schedule"]
        self.removed = removed
        self.errors: list[BaseException] = []
        self.workers: list[Worker] = []
        self.workers_by_thread: dict[int, Worker] = {}
        self.turn = threading.Semaphore(0)
        self.calls_until_failure: dict[str, int] = {}
        """By stream: so many calls of a copy, and then one that fails."""
        self.n_threads_with_device = 0
        self._schedule = schedule
        self._clock = 0

    @property
    def copy_streams(self) -> CopyStreams:
        return CopyStreams(self.streams["to-host"], self.streams["to-device"], self._use_device)

    def _use_device(self) -> None:
        self.n_threads_with_device += 1

    @contextmanager
    def launching(self, name: str) -> Iterator[DoubleStream]:
        """What is launched within goes to this stream."""
        before, self.current = self.current, self.streams[name]
        try:
            yield self.current
        finally:
            self.current = before

    def tick(self) -> int:
        self._clock += 1
        return self._clock

    def is_removed(self, why: Wait, stream: str) -> bool:
        return self.removed is not None and self.removed.covers(why, stream)

    def may_fail(self, stream: str) -> None:
        """A call of a copy, which fails if it is its turn, as if there were no memory."""
        n_left = self.calls_until_failure.pop(stream, None)
        if n_left == 0:
            raise MemoryError("the device has no memory left")
        if n_left is not None:
            self.calls_until_failure[stream] = n_left - 1

    # -- who moves ----------------------------------------------------------------------------

    def breathe(self) -> None:
        """The host has done something: whoever likes to moves."""
        worker = self.workers_by_thread.get(threading.get_ident())
        if worker is not None:
            worker.pause()
            return
        while ready := self._ready():
            chosen = self._schedule.choose(list(ready), forced=False)
            if chosen is None:
                return
            ready[chosen].move()

    def block(self, until: Callable[[], bool]) -> None:
        """The calling thread waits."""
        worker = self.workers_by_thread.get(threading.get_ident())
        if worker is not None:
            worker.pause(until)
            return
        while not until():
            ready = self._ready()
            if not ready:
                raise StuckError("the host waits for what nobody does")
            chosen = self._schedule.choose(list(ready), forced=True)
            assert chosen is not None
            ready[chosen].move()

    def finish(self) -> None:
        """Everything that was asked for is done."""
        self.block(lambda: not self._ready())

    def _ready(self) -> dict[str, Any]:
        actors: list[Any] = [*self.streams.values(), *self.workers]
        return {actor.name: actor for actor in actors if actor.is_ready}


def stepped_queue(device: Device) -> type[TransferQueue[Any]]:
    """Transfer queues whose threads run when it is their turn."""

    class SteppedQueue(TransferQueue[Job]):
        def _start(self) -> None:
            self._worker = Worker(device, self.name, self._work)
            device.workers.append(self._worker)

        def _finish_one(self) -> bool:
            device.workers_by_thread[threading.get_ident()].pause(lambda: not self._jobs.empty())
            return super()._finish_one()

        def submit(self, job: Job) -> None:
            super().submit(job)
            device.breathe()

        def wait(self, timeout_s: float | None = None) -> bool:
            del timeout_s
            device.block(lambda: self._n_finished == self._n_submitted)
            return True

        def close(self, timeout_s: float = 0.0) -> None:
            del timeout_s
            self.end()
            device.block(lambda: self._worker.is_over)

    return SteppedQueue
