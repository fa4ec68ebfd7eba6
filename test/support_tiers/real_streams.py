"""Streams that really run beside the host, in place of the double's: a GPU's, or threads.

Nothing decides here who moves when: the device does, or the system. So that it is not the same
order every time, streams are held up now and then, some of them often.
"""

from __future__ import annotations

import contextlib
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from support_tiers.stream_double import PATIENCE_S, Removed
from tiered_kv.tiers.slots import PageIds
from tiered_kv.tiers.streams import CopyStreams, Point, Stream, Wait

NAMES = ("schedule", "forward", "to-host", "to-device")
#: How long a stream is held up, in seconds: longer than what the small copies of a history take.
HELD_UP_S = (0.0001, 0.002)


class Machine(Protocol):
    """What streams are made of."""

    device: torch.device

    def stream(self, name: str) -> Any:
        """A stream (`tiers.streams.Stream`) in which the host can also be made to wait: `sleep`."""

    def launching(self, stream: Any) -> AbstractContextManager[object]:
        """What is launched within goes to `stream`."""

    def use(self) -> None:
        """Called first by every thread that asks for something."""

    def synchronize(self) -> None:
        """Waits for all streams."""

    def pin(self, address: int, n_bytes: int) -> None: ...

    def unpin(self, address: int) -> None: ...

    def close(self) -> None: ...


@dataclass(eq=False)
class RealPoint:
    """A point whose waits can be left out by their names."""

    point: Any
    stream: RealStream

    def hold(self, why: Wait) -> None:
        if not self.stream.device.is_removed(why, self.stream.name):
            self.point.hold(why)

    def reached(self, why: Wait) -> None:
        if not self.stream.device.is_removed(why, self.stream.name):
            self.point.reached(why)

    def seconds_until(self, later: Point) -> float:
        assert isinstance(later, RealPoint)
        return float(self.point.seconds_until(later.point))


@dataclass(eq=False)
class RealStream:
    """See `tiered_kv.tiers.streams.Stream`."""

    device: RealDevice
    name: str
    inner: Any

    def record(self, *, timed: bool = False) -> RealPoint:
        return RealPoint(self.inner.record(timed=timed), self)

    def wait(self, point: Point, why: Wait) -> None:
        assert isinstance(point, RealPoint)
        if not self.device.is_removed(why, point.stream.name):
            self.inner.wait(point.point, why)

    def follow(self, point: RealPoint) -> None:
        """A wait that is not ours to leave out: the engine's own."""
        self.inner.wait(point.point, Wait.PASSES_FOR_LOAD)

    def run(self, kernel: Callable[[], object]) -> None:
        self.device.may_fail(self.name)
        self.device.may_hold_up(self)
        self.inner.run(kernel)

    def empty(self, n: int) -> torch.Tensor:
        empty: torch.Tensor = self.inner.empty(n)
        return empty

    def upload(self, ids: PageIds) -> torch.Tensor:
        uploaded: torch.Tensor = self.inner.upload(ids)
        return uploaded

    def copy_rows(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self.device.may_fail(self.name)
        self.device.may_hold_up(self)
        self.inner.copy_rows(target, source)


class RealDevice:
    """In place of `stream_double.Device`; seed: which streams are held up, and when."""

    def __init__(self, machine: Machine, seed: int, removed: Removed | None = None) -> None:
        self.machine = machine
        self.streams = {name: RealStream(self, name, machine.stream(name)) for name in NAMES}
        self.removed = removed
        self.errors: list[BaseException] = []
        self.calls_until_failure: dict[str, int] = {}
        self._lock = threading.Lock()
        self._dice = random.Random(seed)
        shares = (0.02, 0.1, 0.5)
        self._held_up = {name: self._dice.choice(shares) for name in NAMES}

    @property
    def copy_streams(self) -> CopyStreams:
        down: Stream = self.streams["to-host"]
        up: Stream = self.streams["to-device"]
        return CopyStreams(down, up, self.machine.use)

    @contextlib.contextmanager
    def launching(self, name: str) -> Iterator[RealStream]:
        """What is launched within goes to this stream."""
        stream = self.streams[name]
        with self.machine.launching(stream.inner):
            yield stream

    def is_removed(self, why: Wait, stream: str) -> bool:
        return self.removed is not None and self.removed.covers(why, stream)

    def may_fail(self, stream: str) -> None:
        """A call of a copy, which fails if it is its turn, as if there were no memory."""
        with self._lock:
            n_left = self.calls_until_failure.pop(stream, None)
            if n_left:
                self.calls_until_failure[stream] = n_left - 1
        if n_left == 0:
            raise MemoryError("the device has no memory left")

    def may_hold_up(self, stream: RealStream) -> None:
        with self._lock:
            is_held_up = self._dice.random() < self._held_up[stream.name]
            seconds = self._dice.uniform(*HELD_UP_S)
        if is_held_up:
            stream.inner.sleep(seconds)

    def finish(self) -> None:
        """Everything that was asked for is done."""
        self.machine.synchronize()


# -- a GPU ----------------------------------------------------------------------------------------


class CudaMachine:
    """The streams of a server. Raises OSError as `cuda_streams.open_streams`."""

    def __init__(self) -> None:
        from tiered_kv.tiers import cuda_streams

        self.device = torch.device("cuda", torch.cuda.current_device())
        copies = cuda_streams.open_streams(self.device)
        self.use = copies.use_device
        properties = torch.cuda.get_device_properties(self.device)
        #: Of its clock, in a second; torch tells kilohertz.
        self._cycles = getattr(properties, "clock_rate", 1_500_000) * 1e3
        plain = {
            name: cuda_streams.CudaStream(torch.cuda.Stream(self.device))
            for name in ("schedule", "forward")
        }
        self._streams: Mapping[str, Any] = {
            **plain,
            "to-host": copies.to_host,
            "to-device": copies.to_device,
        }

    def stream(self, name: str) -> Any:
        stream = self._streams[name]

        def sleep(seconds: float) -> None:
            cycles = int(seconds * self._cycles)
            stream.run(lambda: torch.cuda._sleep(cycles))

        stream.sleep = sleep
        return stream

    def launching(self, stream: Any) -> AbstractContextManager[object]:
        context: AbstractContextManager[object] = torch.cuda.stream(stream._stream)
        return context

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def pin(self, address: int, n_bytes: int) -> None:
        from tiered_kv.tiers.pinned_memory import register_for_dma

        register_for_dma(address, n_bytes)

    def unpin(self, address: int) -> None:
        torch.cuda.cudart().cudaHostUnregister(address)

    def close(self) -> None:
        self.synchronize()


# -- threads --------------------------------------------------------------------------------------


class ThreadPoint:
    def __init__(self, machine: ThreadMachine) -> None:
        self._machine = machine
        self._is_reached = threading.Event()
        self.at_s = 0.0

    def reach(self) -> None:
        self.at_s = time.perf_counter()
        self._is_reached.set()

    def hold(self, why: Wait) -> None:
        self._machine.current().wait(self, why)

    def reached(self, why: Wait | None = None) -> None:
        del why
        assert self._is_reached.wait(PATIENCE_S), "a stream never comes to a point"

    def seconds_until(self, later: ThreadPoint) -> float:
        return later.at_s - self.at_s


class ThreadStream:
    """A thread that does what it is asked for, one after the other."""

    def __init__(self, machine: ThreadMachine, name: str) -> None:
        self._machine = machine
        self._asked: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"stream {name}", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (asked := self._asked.get()) is not None:
            try:
                asked()
            except BaseException as error:
                self._machine.errors.append(error)

    def record(self, *, timed: bool = False) -> ThreadPoint:
        del timed
        point = ThreadPoint(self._machine)
        self._asked.put(point.reach)
        return point

    def wait(self, point: Any, why: Wait) -> None:
        del why
        self._asked.put(point.reached)

    def run(self, kernel: Callable[[], object]) -> None:
        self._asked.put(kernel)

    def sleep(self, seconds: float) -> None:
        self._asked.put(lambda: time.sleep(seconds))

    def empty(self, n: int) -> torch.Tensor:
        return torch.zeros(n, dtype=torch.int64)

    def upload(self, ids: PageIds) -> torch.Tensor:
        now, later = torch.from_numpy(ids.copy()), self.empty(len(ids))
        self._asked.put(lambda: later.copy_(now))
        return later

    def copy_rows(self, target: torch.Tensor, source: torch.Tensor) -> None:
        assert target.shape == source.shape
        self._asked.put(lambda: target.copy_(source))

    def end(self) -> None:
        self._asked.put(None)
        self._thread.join(PATIENCE_S)


class ThreadMachine:
    """Streams as threads on a CPU, so that what a GPU is to be asked can be rehearsed."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        self._streams = {name: ThreadStream(self, name) for name in NAMES}
        self._local = threading.local()

    def stream(self, name: str) -> ThreadStream:
        return self._streams[name]

    def current(self) -> ThreadStream:
        current: ThreadStream = getattr(self._local, "stream", self._streams["schedule"])
        return current

    @contextlib.contextmanager
    def launching(self, stream: ThreadStream) -> Iterator[None]:
        before, self._local.stream = self.current(), stream
        try:
            yield
        finally:
            self._local.stream = before

    def use(self) -> None:
        pass

    def synchronize(self) -> None:
        for stream in self._streams.values():
            stream.record().reached()
        for error in self.errors:
            raise error

    def pin(self, address: int, n_bytes: int) -> None:
        pass

    def unpin(self, address: int) -> None:
        pass

    def close(self) -> None:
        for stream in self._streams.values():
            stream.end()
