"""Value per byte: P(it is used again) x the cost to bring it back / its bytes.

Greedy-dual (Young 1994; Cao and Irani, USENIX ITS 1997): a leaf's priority is its value plus the
level at its last use, and the level rises to the priority of what is evicted. So a value is worth
so much time, recency needs no clock, and a decision costs a few heap operations, not a scan.

Priorities are the square roots of values. Greedy-dual keeps a leaf for a time proportional to its
value, as if reuse came at random; but a prompt that was not used for long is likely over, and the
plain value lost to LRU on recorded traffic where the cache is large (docs/placement.md).
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable

from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.node import Node
from tiered_kv.forest.residency import Residency
from tiered_kv.memory.costs import Costs, EqualCosts
from tiered_kv.memory.demand import DemandForecast, Expectation
from tiered_kv.memory.leaf_walk import MayGo, NewLeaves
from tiered_kv.memory.reuse import ReuseClass, ReuseEstimator, class_of
from tiered_kv.memory.uses import UseCounter

#: A prefix that one request is sure to need now is worth this many sure uses some day.
FORECAST_WEIGHT = 64.0
#: An expected use this far ahead is worth half of one now.
FORECAST_HALF_S = 10.0
#: Requests beyond this number do not make a prefix more valuable.
FORECAST_REQUESTS_MAX = 8
#: No class is given up on: what is evicted at once can show no reuse.
PROBABILITY_MIN = 0.1
#: A leaf whose turn has come is kept if it is worth this much more than when it was queued.
REVALUE_FACTOR = 1.25


class Demand:
    """Worth of the forecast by node: a number to add to the probability of reuse."""

    def __init__(self, forest: Forest) -> None:
        self._forest = forest
        self._worth: dict[int, float] = {}
        self.generation = 0

    def update(self, forecast: DemandForecast) -> None:
        """Replace the forecast. O(its nodes and those above them)."""
        self._worth = {}
        self.generation += 1
        for node_id, expectation in forecast.next_use.items():
            worth = _worth_of(expectation)
            node = self._forest.find(node_id)
            # Everything above is needed with it; a parent that is worth more already has been here.
            while node is not None and not node.is_root:
                if self._worth.get(node.node_id, 0.0) >= worth:
                    break
                self._worth[node.node_id] = worth
                node = node.parent

    def worth(self, node: Node) -> float:
        return self._worth.get(node.node_id, 0.0) if self._worth else 0.0


def _worth_of(expectation: Expectation) -> float:
    soon = FORECAST_HALF_S / (FORECAST_HALF_S + max(0.0, expectation.starts_in_s))
    requests = min(max(expectation.requests, 1), FORECAST_REQUESTS_MAX)
    return FORECAST_WEIGHT * soon * expectation.probability * requests


class _Levels:
    """The level over time: what a node last used at some tick has for a start."""

    _POINTS_MAX = 4096

    def __init__(self) -> None:
        self.now = 0.0
        self._ticks = [0]
        self._levels = [0.0]

    def rise(self, level: float, tick: int) -> None:
        """The level is at least `level` from `tick` on."""
        if level <= self.now:
            return
        self.now = level
        if tick > self._ticks[-1]:
            self._ticks.append(tick)
            self._levels.append(level)
            if len(self._ticks) > self._POINTS_MAX:
                half = self._POINTS_MAX // 2
                self._ticks[:half] = self._ticks[:half:2]
                self._levels[:half] = self._levels[:half:2]
        else:
            self._levels[-1] = level

    def at(self, tick: int) -> float:
        """The level before anything was evicted after `tick`."""
        return self._levels[bisect_right(self._ticks, tick) - 1]


class _Entry:
    """What is remembered of a node that is, or lately was, a leaf."""

    __slots__ = ("kind", "last_access", "priority", "value")

    def __init__(self, kind: ReuseClass) -> None:
        self.kind = kind
        self.last_access = 0
        self.value = 0.0
        self.priority = 0.0


class ByValue:
    """The leaf that is worth least per byte, later on a tie the older node.

    A lazy heap of (priority, node id).
    """

    _SLACK = 256
    _GHOSTS_MIN = 1024

    def __init__(self, forest: Forest, tier: Tier) -> None:
        self._forest = forest
        self._tier = tier
        self._demand = Demand(forest)
        self._costs: Costs = EqualCosts()
        self._new = NewLeaves(forest, tier)
        self._uses = UseCounter(forest)
        self._reuse = ReuseEstimator()
        self._levels = _Levels()
        self._newest_tick = 0
        self._heap: list[tuple[float, int]] = []
        self._entries: dict[int, _Entry] = {}
        # By page hash: a node's id does not survive its leaving the forest.
        self._ghosts: OrderedDict[bytes, tuple[ReuseClass, int]] = OrderedDict()

    def refresh(self) -> None:
        for node in self._new.take():
            self._look(node)
            self._push(node)
        find = self._forest.find
        if len(self._entries) > 2 * len(self._forest) + self._SLACK:
            self._entries = {k: v for k, v in self._entries.items() if find(k) is not None}
        if len(self._heap) > 4 * len(self._entries) + self._SLACK:
            self._heap = [(entry.priority, k) for k, entry in self._entries.items()]
            heapq.heapify(self._heap)

    def add(self, node: Node) -> None:
        self._look(node)
        if not self._uses.uses(node):
            # It has had children, so it was used after it was made.
            self._uses.set(node, 1)
        self._push(node)

    def pop(self, may_go: MayGo) -> Node | None:
        while self._heap:
            priority, node_id = heapq.heappop(self._heap)
            entry = self._entries.get(node_id)
            node = self._forest.find(node_id)
            if entry is None or node is None or entry.priority != priority or not may_go(node):
                continue
            if entry.last_access != node.last_access:
                self._look(node)
                self._push(node)
            elif self.value(node) > entry.value * REVALUE_FACTOR:
                self._push(node)
            else:
                return node
        return None

    def put_back(self, victims: Iterable[Node]) -> None:
        for node in victims:
            entry = self._entries[node.node_id]
            self._levels.rise(entry.priority, self._newest_tick)
            self._reuse.gone(entry.kind)
            self._remember(node, entry)
            heapq.heappush(self._heap, (entry.priority, node.node_id))

    def value(self, node: Node) -> float:
        """Root of: probability of reuse, plus the forecast's worth, times the cost per byte."""
        kind = class_of(node, self._uses.uses(node))
        weight = max(self._reuse.probability(kind), PROBABILITY_MIN) + self._demand.worth(node)
        return math.sqrt(weight * self.cost_per_byte(node))

    def cost_per_byte(self, node: Node) -> float:
        """Seconds to bring back a byte of `node`, lost to the tier, the cheapest way there is."""
        costs, tier = self._costs, self._tier
        n_bytes = max(1.0, node.n_tokens * costs.bytes_per_token(tier))
        cheapest_s = costs.recompute_s(node.start, node.end)
        for source in self._forest.tiers:
            if source > tier and node.state(source) is Residency.RESIDENT:
                moved = max(1, int(node.n_tokens * costs.bytes_per_token(source)))
                cheapest_s = min(cheapest_s, costs.load_s(source, tier, moved))
                break
        return cheapest_s / n_bytes

    def inform(self, costs: Costs) -> None:
        """Use these costs from now on."""
        self._costs = costs

    def on_forecast(self, forecast: DemandForecast) -> None:
        """Protect what is expected to be needed, as far as it pays."""
        self._demand.update(forecast)

    def _look(self, node: Node) -> None:
        """Notice a use, or a return, since the last look."""
        self._newest_tick = max(self._newest_tick, node.last_access)
        entry = self._entries.get(node.node_id)
        was_used = self._uses.look(node)
        ghost = self._ghosts.pop(node.last_page_hash, None) if self._ghosts else None
        if ghost is not None and ghost[1] != node.last_access:
            self._reuse.came_back(ghost[0])
            self._uses.set(node, ghost[0].uses + 1)
        elif was_used and entry is not None:
            self._reuse.used(entry.kind)

    def _push(self, node: Node) -> None:
        entry = self._entries.get(node.node_id)
        kind = class_of(node, self._uses.uses(node))
        if entry is None:
            entry = self._entries[node.node_id] = _Entry(kind)
        entry.kind = kind
        entry.last_access = node.last_access
        entry.value = self.value(node)
        entry.priority = self._levels.at(node.last_access) + entry.value
        heapq.heappush(self._heap, (entry.priority, node.node_id))

    def _remember(self, node: Node, entry: _Entry) -> None:
        self._ghosts[node.last_page_hash] = (entry.kind, node.last_access)
        limit = max(self._GHOSTS_MIN, 2 * len(self._forest.leaves(self._tier)))
        while len(self._ghosts) > limit:
            self._ghosts.popitem(last=False)
