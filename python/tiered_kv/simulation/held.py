"""Who of those who wait is kept out of plans because pages are on their way from disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tiered_kv.memory.read_order import Urgency
from tiered_kv.scheduler.request import QueuedRequest
from tiered_kv.scheduler.request_policy import Arriving, RequestPolicy
from tiered_kv.scheduler.waiting import WaitingQueue
from tiered_kv.simulation.cache import TieredCache


class HeldRequests:
    """As the server's `QueuedRequests` does it. let_go: is called when one may start."""

    def __init__(
        self,
        cache: TieredCache,
        waiting: WaitingQueue,
        policy: RequestPolicy,
        let_go: Callable[[], None],
    ) -> None:
        self.arriving: dict[int, Arriving] = {}
        """What is on its way for each of them, by id."""
        self._cache = cache
        self._waiting: Mapping[int, QueuedRequest] = waiting.requests
        self._policy = policy
        self._let_go = let_go
        cache.on_news = self.hear
        if cache.reads is not None:
            cache.reads.urgency_of = self._urgency_of

    def __len__(self) -> int:
        return len(self.arriving)

    def hear(self) -> None:
        """Pages are on their way now, or have come: who waits for some, and who may start?"""
        for request_id in self._cache.take_news():
            if request_id not in self._waiting:
                continue
            arriving = self._cache.arriving(request_id)
            if arriving is not None:
                self.arriving[request_id] = arriving
            elif self.arriving.pop(request_id, None) is not None:
                self._let_go()

    def wait_no_longer(self, request_id: int) -> None:
        """It is to run without the pages that have not come."""
        self.arriving.pop(request_id, None)
        self._cache.wait_no_longer(request_id)

    def left_queue(self, request_id: int) -> None:
        self.arriving.pop(request_id, None)

    def _urgency_of(self, rid: str) -> Urgency | None:
        queued = self._waiting.get(int(rid))
        return None if queued is None else self._policy.urgency(queued)
