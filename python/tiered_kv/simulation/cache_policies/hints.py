"""Clients that say when their next call comes, and what is learned of those that do not.

The simulated counterpart of `plugin/queue/foretold.py`: announcements are kept by the same rules,
and the memory manager gets them together with what the order of the queue expects. There is no
timer: times until announced calls are brought up to date whenever a request ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tiered_kv.core.config import MemoryConfig
from tiered_kv.forest.forest import Forest
from tiered_kv.memory.actions import Load
from tiered_kv.memory.costs import Costs
from tiered_kv.memory.demand import DemandForecast, Expectation
from tiered_kv.memory.eviction import OrderFactory
from tiered_kv.memory.manager import MemoryManager
from tiered_kv.scheduler.next_calls import NextCalls
from tiered_kv.scheduler.pauses import LearnedPauses, Pause
from tiered_kv.simulation.live import LiveRequest


class Hints:
    """Calls that are expected after requests that ended; the listener of one instance."""

    def __init__(self, *, are_said: bool, are_learned: bool) -> None:
        """are_said: by clients; are_learned: what nobody says is foretold from what was."""
        self.announced: Mapping[int, Expectation] = {}
        self.on_change: Callable[[], None] = lambda: None
        self._calls = NextCalls()
        self._are_said = are_said
        self._pauses = LearnedPauses() if are_learned else None

    def on_arrival(self, live: LiveRequest, now_s: float) -> None:
        """Its session's pause is over."""
        if self._pauses is not None:
            self._pauses.arrived(live.queued, now_s)

    def on_admission(self, live: LiveRequest) -> None:
        """What it goes on from is needed now, and not again as far as is known."""
        self._calls.came(node.node_id for node in live.queued.path)

    def on_finish(self, live: LiveRequest, forest: Forest, now_s: float) -> None:  # noqa: ARG002
        """Its client says when the next call is due, if there will be one, or it is learned."""
        last = live.pinned
        hint_s = live.request.next_use_hint_s if self._are_said else None
        pause = None if hint_s is None else Pause(hint_s, 1.0)
        if self._pauses is not None:
            learned = self._pauses.ended(live.queued, live.request.ending or None, now_s)
            pause = pause or learned
        if pause is not None and last is not None and not last.is_root:
            self._calls.announce(last.node_id, now_s, pause.in_s, pause.probability)
        self.announced = self._calls.expected(now_s)
        self.on_change()


class HintedManager(MemoryManager):
    """The server's memory manager, told of announced calls as well."""

    def __init__(
        self,
        forest: Forest,
        config: MemoryConfig,
        costs: Costs,
        *,
        hints: Hints,
        make_order: OrderFactory | None = None,
    ) -> None:
        super().__init__(forest, config, costs, make_order=make_order)
        self._hints = hints
        self._queued = DemandForecast()
        hints.on_change = self._tell

    def on_forecast(self, forecast: DemandForecast, device_pages_free: int) -> list[Load]:
        """See `MemoryManager.on_forecast`; `forecast` is what the queue expects."""
        self._queued = forecast
        return super().on_forecast(self._all(), device_pages_free)

    def _tell(self) -> None:
        self._eviction.on_forecast(self._all())

    def _all(self) -> DemandForecast:
        return DemandForecast({**self._hints.announced, **self._queued.next_use})
