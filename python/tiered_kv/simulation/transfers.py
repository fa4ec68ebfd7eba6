"""Links between tiers: one transfer at a time each, in order, with latency and bandwidth."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from tiered_kv.scheduler.cost_model import EdgeCost
from tiered_kv.simulation.events import EventQueue

Observer = Callable[[str, float, float, int], None]
"""Told of each finished transfer: link's name, start and end in seconds, bytes."""


def together(*observers: Observer | None) -> Observer:
    """One observer that tells all of those that are there."""
    present = [observer for observer in observers if observer is not None]

    def observe(link: str, start_s: float, end_s: float, n_bytes: int) -> None:
        for observer in present:
            observer(link, start_s, end_s, n_bytes)

    return observe


@dataclass(slots=True, eq=False)
class Transfer:
    """Bytes on their way, or waiting for the link. Compared by identity."""

    n_bytes: int
    done: Callable[[float], None]
    """Called with the time at which the last byte arrives."""
    start_s: float | None = None
    """When the link began with it; None while it waits."""
    event: int = -1


class Link:
    """A first-in-first-out queue in front of a pipe: latency per transfer, then bandwidth."""

    def __init__(
        self, name: str, cost: EdgeCost, events: EventQueue, observer: Observer | None = None
    ) -> None:
        self.name = name
        self.cost = cost
        self.n_bytes = 0
        """Bytes carried so far."""
        self.busy_s = 0.0
        """Seconds that transfers took so far."""
        self._events = events
        self._observer = observer
        self._queue: deque[Transfer] = deque()
        self._queued_bytes = 0

    @property
    def queued_bytes(self) -> int:
        """Bytes of all transfers not finished, the one under way in full."""
        return self._queued_bytes

    def __len__(self) -> int:
        return len(self._queue)

    def submit(self, n_bytes: int, done: Callable[[float], None]) -> Transfer:
        """Send `n_bytes` behind what is queued already."""
        transfer = Transfer(n_bytes, done)
        self._queue.append(transfer)
        self._queued_bytes += n_bytes
        if len(self._queue) == 1:
            self._start()
        return transfer

    def expected_end_s(self) -> float:
        """When all that is queued now will have arrived; now if nothing is."""
        now_s = self._events.now()
        if not self._queue:
            return now_s
        first = self._queue[0]
        start_s = first.start_s if first.start_s is not None else now_s
        waiting_s = sum(self._duration_s(transfer) for transfer in self._queue)
        return start_s + waiting_s

    def cancel(self, transfer: Transfer) -> float:
        """Stop `transfer`, which is not finished; returns the share of it that has arrived."""
        share = 0.0
        self._queued_bytes -= transfer.n_bytes
        if transfer.start_s is None:
            self._queue.remove(transfer)
            return share
        elapsed_s = self._events.now() - transfer.start_s
        streaming_s = transfer.n_bytes / self.cost.bandwidth
        if streaming_s > 0:
            share = min(1.0, max(0.0, elapsed_s - self.cost.latency_s) / streaming_s)
        self._events.cancel(transfer.event)
        self.busy_s += elapsed_s
        self.n_bytes += int(share * transfer.n_bytes)
        self._next()
        return share

    def _duration_s(self, transfer: Transfer) -> float:
        return self.cost.latency_s + transfer.n_bytes / self.cost.bandwidth

    def _start(self) -> None:
        transfer = self._queue[0]
        transfer.start_s = self._events.now()
        end_s = transfer.start_s + self._duration_s(transfer)
        transfer.event = self._events.schedule(end_s, self._finish)

    def _finish(self, now_s: float) -> None:
        transfer = self._queue[0]
        assert transfer.start_s is not None
        self._queued_bytes -= transfer.n_bytes
        self.n_bytes += transfer.n_bytes
        self.busy_s += now_s - transfer.start_s
        if self._observer is not None:
            self._observer(self.name, transfer.start_s, now_s, transfer.n_bytes)
        self._next()
        transfer.done(now_s)

    def _next(self) -> None:
        self._queue.popleft()
        if self._queue:
            self._start()
