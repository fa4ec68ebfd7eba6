"""The way to a shared store: when it is used, when it is left alone, and what came of it.

An error, or an answer that takes too long, closes it for 1 s, 2 s, 4 s ... at most 60 s; then one
call is let through. Asking, reading and writing each have a gate of their own: a store may be full,
or may know what it has and not give it. While asking or reading is closed nobody is kept waiting:
the store has nothing.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from tiered_kv.tiers.gate import Gate
from tiered_kv.tiers.shared.asker import Asker
from tiered_kv.tiers.shared.blobs import Blobs

#: What a question, or moving some megabytes, may take.
DEADLINE_S = 2.0
#: Operations, as metrics name them.
OPERATIONS = ASK, READ, WRITE = "ask", "read", "write"

T = TypeVar("T")


@dataclass(slots=True)
class LinkStats:
    """Since the start. By operation: calls that came to something, calls that failed, seconds."""

    calls: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(OPERATIONS, 0.0))
    bad_pages: int = 0
    """Blobs that were not the page that their name stands for."""


class StoreLink:
    """Every method is thread-safe. deadline_s: see `DEADLINE_S`."""

    def __init__(
        self,
        blobs: Blobs,
        deadline_s: float = DEADLINE_S,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.blobs = blobs
        self.deadline_s = deadline_s
        self.asking = self._gate("asked", now)
        self.reading = self._gate("read", now)
        self.writing = self._gate("written", now)
        self.stats = LinkStats()
        self.read_memory = Scratch(blobs)
        self.write_memory = Scratch(blobs)
        self._lock = threading.Lock()
        self._asker = Asker("tiered-kv-store-asks")
        self._now = now
        # Since when blobs are on their way, with the gate that they came through.
        self._moving: dict[int, tuple[float, Gate]] = {}
        self._n_moves = 0

    def _gate(self, done: str, now: Callable[[], float]) -> Gate:
        return Gate(
            f"Store {self.blobs.name} is not {done} because of an error (%s); it is tried again by "
            "itself.",
            f"Store {self.blobs.name} is {done} again after %.1f s.",
            now,
        )

    @property
    def is_readable(self) -> bool:
        """Whether it is worth asking for something. Waits for nothing."""
        return not self._is_stalled() and self.asking.is_passable and self.reading.is_passable

    @property
    def is_degraded(self) -> bool:
        """Whether it is left alone for a while, in one way or another."""
        gates = (self.asking, self.reading, self.writing)
        return self._is_stalled() or any(gate.is_degraded for gate in gates)

    def _is_stalled(self) -> bool:
        """Whether blobs have been on their way for longer than the deadline: it is as an error."""
        with self._lock:
            began_s, gate = next(iter(self._moving.values()), (None, self.reading))
        if began_s is None or self._now() - began_s <= self.deadline_s:
            return False
        gate.shut(self._too_late())
        return True

    def _too_late(self) -> TimeoutError:
        return TimeoutError(f"no answer within {self.deadline_s:g} s")

    def ask(self, call: Callable[[], T]) -> T | None:
        """What the store says; None if it fails, or failed a moment ago, or says nothing in time.

        `call` touches no memory of others.
        """
        return self._pass(self.asking, ASK, lambda: self._asker.ask(call, self.deadline_s))

    def read(self, call: Callable[[], T]) -> T | None:
        """What `call` returns, which fills memory; None if it fails or failed a moment ago.

        It is waited for however long it takes: until then the memory is not free.
        """
        return self._pass(self.reading, READ, self._moved(self.reading, call))

    def write(self, call: Callable[[], T]) -> T | None:
        """As `read`."""
        return self._pass(self.writing, WRITE, self._moved(self.writing, call))

    def _moved(self, gate: Gate, call: Callable[[], T]) -> Callable[[], T]:
        def move() -> T:
            with self._lock:
                self._n_moves += 1
                number = self._n_moves
                self._moving[number] = (self._now(), gate)
            try:
                return call()
            finally:
                with self._lock:
                    del self._moving[number]

        return move

    def _pass(self, gate: Gate, operation: str, call: Callable[[], T]) -> T | None:
        admission = gate.try_enter()
        if admission is None:
            return None
        began_s = self._now()
        try:
            answer = call()
        except BaseException as error:
            gate.fail(admission, error)
            self._count(operation, began_s, has_failed=True)
            if isinstance(error, Exception):
                return None
            raise
        is_late = self._now() - began_s > self.deadline_s
        if is_late:  # What came is good, but nobody is to wait for more.
            gate.fail(admission, self._too_late())
        else:
            gate.succeed(admission)
        self._count(operation, began_s, has_failed=is_late)
        return answer

    def _count(self, operation: str, began_s: float, *, has_failed: bool) -> None:
        with self._lock:
            counts = self.stats.failed if has_failed else self.stats.calls
            counts[operation] += 1
            self.stats.seconds[operation] += self._now() - began_s

    def count_bad(self) -> None:
        """A blob was not the page that its name stands for."""
        with self._lock:
            self.stats.bad_pages += 1

    def close(self) -> None:
        self.blobs.close()


class Scratch:
    """Memory that one call at a time works with."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        self._lock = threading.Lock()
        self._memory = memoryview(b"")

    @contextmanager
    def take(self, n_bytes: int) -> Iterator[memoryview]:
        with self._lock:
            if len(self._memory) < n_bytes:
                self._memory = self._blobs.memory(n_bytes)
            yield self._memory[:n_bytes]
