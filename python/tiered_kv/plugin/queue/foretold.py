"""What the tiers are told is coming: by the queue's policy, and after requests that ended.

When the next call comes that goes on from one that ended is for its caller to say (`hints`), and
learned from earlier ones where nobody does (`scheduler/pauses.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from tiered_kv.forest.node import Node
from tiered_kv.memory.demand import DemandForecast, Expectation
from tiered_kv.memory.manager import LOAD_AHEAD_PROBABILITY, LOAD_AHEAD_S
from tiered_kv.plugin.requests.salts import root_key
from tiered_kv.plugin.requests.view import QUEUED, ending_of, is_probe, queued_of, terms_of
from tiered_kv.scheduler.next_calls import NextCalls
from tiered_kv.scheduler.pauses import LearnedPauses, Pause
from tiered_kv.scheduler.request import QueuedRequest
from tiered_kv.scheduler.request_policy import ForecastingPolicy, RequestPolicy, SchedulerState
from tiered_kv.tiers.announced_prompts import AnnouncedPrompts

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from tiered_kv.tiers.hierarchy import KVHierarchy

#: How often the time until announced calls is brought up to date.
REFRESH_S = 1.0
#: A call's prompt comes from disk so long before it is due: in time to go on to the device.
FETCH_AHEAD_S = 2 * LOAD_AHEAD_S


class Foretold:
    """Tells the hierarchy whenever the forecast has changed. Times are of the ranks' clock."""

    def __init__(self, hierarchy: KVHierarchy, policy: RequestPolicy) -> None:
        self.calls = NextCalls()
        self.pauses = LearnedPauses()
        self.prompts = AnnouncedPrompts(hierarchy)
        self._hierarchy = hierarchy
        self._policy = policy if isinstance(policy, ForecastingPolicy) else None
        self._queued = DemandForecast()
        self._announced: dict[int, Expectation] = {}
        self.told: Mapping[int, Expectation] = {}
        """What the hierarchy was told last, by node id."""
        self._refreshed_s = 0.0

    def is_due(self, now_s: float) -> bool:
        """Whether announced calls want `tick` to be called again."""
        return bool(self.calls or self._announced) and now_s - self._refreshed_s >= REFRESH_S

    def tick(self, now_s: float) -> None:
        """Time goes on."""
        if self.is_due(now_s):
            self._refresh(now_s)

    def planned(self, state: SchedulerState) -> None:
        """The policy has planned from `state`."""
        if self._policy is None:
            return
        forecast = self._policy.forecast(state)
        if forecast is not self._queued and forecast != self._queued:
            self._queued = forecast
            self._tell()

    def arrived(self, req: Req, now_s: float) -> None:
        """`req` is new in the queue."""
        if not is_probe(req):
            self.pauses.arrived(queued_of(req), now_s)

    def ended(self, req: Req, last: Node, now_s: float) -> None:
        """`req` has its answer, and what it computed is in the tree down to `last`."""
        pause = self._pause(req, now_s)
        if last.is_root:
            return
        if terms_of(req).hints.next_call_probability <= 0.0:
            self._hierarchy.last_use(last)
        if pause is None:
            return
        self.calls.announce(last.node_id, now_s, pause.in_s, pause.probability)
        if pause.probability >= LOAD_AHEAD_PROBABILITY:
            self.prompts.remember(last, root_key(req.extra_key))
        self._refresh(now_s)

    def _pause(self, req: Req, now_s: float) -> Pause | None:
        """Until the call that goes on from `req`: as was said, else as is learned."""
        hints, learned = terms_of(req).hints, None
        if hasattr(req, QUEUED) and not is_probe(req):
            learned = self.pauses.ended(queued_of(req), ending_of(req), now_s)
        if hints.next_call_in_s is not None:
            return Pause(hints.next_call_in_s, hints.next_call_probability)
        return learned if hints.next_call_probability > 0.0 else None

    def admitted(self, requests: Iterable[QueuedRequest]) -> None:
        """`requests` run: what they go on from is needed now, and not again as far as is known."""
        if self.calls:
            for request in requests:
                node_ids = [node.node_id for node in request.path]
                self.calls.came(node_ids)
                self.prompts.forget(node_ids)

    def _refresh(self, now_s: float) -> None:
        self._refreshed_s = now_s
        self._announced = self.calls.expected(now_s)
        self.prompts.forget_others(self.calls)
        self._fetch()
        self._tell()

    def _fetch(self) -> None:
        """What is due soon and likely comes from disk."""
        for node_id, expected in list(self._announced.items()):
            is_soon = expected.starts_in_s <= FETCH_AHEAD_S
            if is_soon and expected.probability >= LOAD_AHEAD_PROBABILITY:
                end_id = self.prompts.fetch(node_id)
                if end_id != node_id:
                    self.calls.moved(node_id, end_id)
                    self._announced[end_id] = self._announced.pop(node_id)

    def _tell(self) -> None:
        self.told = {**self._announced, **self._queued.next_use}
        self._hierarchy.forecast(DemandForecast(self.told))
