"""Calls that are to come: what finished requests said of the ones that will go on from them.

An agent's context is idle while a tool runs, and no queue tells of it. Whoever runs the agent may
know for how long (`Hints.next_call_in_s`): until then, and for a while after, its prefix is worth
keeping, and shortly before worth bringing nearer (Continuum, arXiv 2511.02230, keeps it for a time
to live; KVFlow, arXiv 2507.07400, by steps to the next execution).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

from tiered_kv.memory.demand import Expectation

#: Announcements that are kept; the oldest go first.
CALLS_MAX = 1024
#: The soonest of them that are foretold at a time: what depends on it is O(these), each time.
FORETOLD_MAX = 64
#: One that has not come is expected as long again as it was to take, and at least so long.
GRACE_S = 10.0


@dataclass(frozen=True, slots=True)
class _Call:
    due_s: float
    gone_s: float
    """When nobody expects it any more."""
    probability: float


def gone_after_s(in_s: float) -> float:
    """How long a call is expected that was to come in so many seconds."""
    return in_s + max(in_s, GRACE_S)


class NextCalls:
    """Announced calls by the node after which they go on. Times are of one clock."""

    def __init__(self) -> None:
        self._calls: dict[int, _Call] = {}

    def __len__(self) -> int:
        return len(self._calls)

    def __contains__(self, node_id: object) -> bool:
        return node_id in self._calls

    def announce(self, node_id: int, now_s: float, in_s: float, probability: float) -> None:
        """A call that goes on after `node_id` comes in `in_s` seconds; probability 0: none does."""
        self._calls.pop(node_id, None)
        if probability <= 0.0:
            return
        if len(self._calls) >= CALLS_MAX:
            del self._calls[next(iter(self._calls))]
        self._calls[node_id] = _Call(now_s + in_s, now_s + gone_after_s(in_s), probability)

    def came(self, node_ids: Iterable[int]) -> None:
        """A request goes on after these nodes: it is there, and need not be expected."""
        for node_id in node_ids:
            self._calls.pop(node_id, None)

    def moved(self, node_id: int, end_id: int) -> None:
        """What the call after `node_id` goes on from ends at `end_id` by now."""
        self._calls[end_id] = self._calls.pop(node_id)

    def expected(self, now_s: float) -> dict[int, Expectation]:
        """The soonest ones, by node; forgets those that did not come.

        One that is late is expected to take as long again as it is late.
        """
        for node_id in [i for i, call in self._calls.items() if call.gone_s < now_s]:
            del self._calls[node_id]
        soonest = heapq.nsmallest(
            FORETOLD_MAX,
            self._calls.items(),
            key=lambda item: (abs(item[1].due_s - now_s), item[0]),
        )
        return {
            node_id: Expectation(abs(call.due_s - now_s), call.probability)
            for node_id, call in soonest
        }
