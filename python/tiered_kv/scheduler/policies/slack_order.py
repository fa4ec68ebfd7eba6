"""Gangs within an order: behind whoever has a turn come those whom its prefix makes cheap.

And who would compute what another member is computing is kept back until that is done (`gang.py`).
Whose turn it is, and when, is `slack.py`'s say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from tiered_kv.scheduler.gang import Gangs
from tiered_kv.scheduler.memory_forecast import OutputLengths
from tiered_kv.scheduler.policies.slack_config import SlackConfig
from tiered_kv.scheduler.prompt_trie import TrieNode
from tiered_kv.scheduler.request import QueuedRequest
from tiered_kv.scheduler.request_policy import SchedulerState
from tiered_kv.scheduler.slack import Price

#: Members of a gang looked at behind one request.
GANG_LOOK = 16


@dataclass(slots=True, eq=False)
class Entry:
    """One who waits."""

    request: QueuedRequest
    price: Price
    deadline_s: float


@dataclass(frozen=True, slots=True, eq=False)
class Queue:
    """Those who wait, as one plan sees them."""

    entries: Mapping[int, Entry]
    gangs: Gangs
    lengths: OutputLengths
    slowdown: float
    is_to_wait: Callable[[int], bool]
    """Whether it does better to wait, for its pages or for the rest of its gang."""


class GangOrder:
    """One plan's order in the making: each request comes once, at its first turn."""

    def __init__(
        self, queue: Queue, state: SchedulerState, config: SlackConfig, spare_s: float
    ) -> None:
        """spare_s: what followers may take before those who have their turns would be late."""
        self._queue = queue
        self._state = state
        self._config = config
        self.spare_s = spare_s
        self._seen: set[int] = set()
        self._chosen: set[TrieNode] = set()
        """What those before compute, or find on the device."""
        self._looked_at: set[TrieNode] = set()

    def alone(self, ids: Iterable[int]) -> Iterator[int]:
        """`ids`, kept back by nothing and nobody, and followed by nobody."""
        for request_id in self._first_turns(ids):
            self._seen.add(request_id)
            self._may_start(request_id)
            yield request_id

    def with_gangs(self, ids: Iterable[int]) -> Iterator[int]:
        """Those of `ids` that need not wait, each with its gang behind it."""
        entries, slowdown = self._queue.entries, self._queue.slowdown
        for request_id in self._first_turns(ids):
            if self._queue.is_to_wait(request_id):
                continue
            self._seen.add(request_id)
            if not self._may_start(request_id):
                continue
            yield request_id
            for member_id in self._followers(request_id):
                work_s = entries[member_id].price.takes_s(slowdown)
                if work_s <= self.spare_s and self._may_start(member_id):
                    self.spare_s -= work_s
                    self._seen.add(member_id)
                    yield member_id

    def _first_turns(self, ids: Iterable[int]) -> Iterator[int]:
        for request_id in ids:
            if request_id not in self._seen and request_id in self._queue.entries:
                yield request_id

    def _may_start(self, request_id: int) -> bool:
        """False if somebody else computes enough of its prompt; else its path is `chosen`."""
        if not self._config.gangs:
            return True
        request = self._queue.entries[request_id].request
        unit = self._state.waiting.tokens_per_unit
        shared = self._queue.gangs.computed_by_others(request_id, self._chosen) * unit
        if self._is_worth_waiting_for(request, shared - request.cached_tokens):
            return False
        self._chosen.update(self._queue.gangs.path(request_id))
        return True

    def _is_worth_waiting_for(self, request: QueuedRequest, tokens: int) -> bool:
        """Whether `tokens` that another one computes are enough for `request` to be kept back.

        Of branches that came together it is known how many do so, at the price of one more pass.
        """
        if tokens >= self._config.share_min_tokens:
            return True
        if tokens <= 0 or request.branches < 2:
            return False
        costs = self._state.costs
        saved_s = (request.branches - 1) * costs.marginal_prefill_s(tokens, request.cached_tokens)
        return saved_s > costs.iteration_s(((1, 0),), 0, 0)

    def _followers(self, request_id: int) -> list[int]:
        """Members of its gang that are cheap while its prefix is on the device, cheapest first."""
        queue, state = self._queue, self._state
        node = queue.gangs.node_of(request_id) if self._config.gangs else None
        if node is None or node in self._looked_at:
            return []
        self._looked_at.add(node)
        prefix = node.end * state.waiting.tokens_per_unit
        if queue.entries[request_id].request.device_tokens < prefix:
            # It is the same prefix for all of them: it would have to be computed or loaded first.
            return []
        saved_s = state.costs.marginal_prefill_s(prefix)
        found = []
        for member in islice(queue.gangs.members(node), GANG_LOOK):
            member_id = member.request_id
            entry = queue.entries.get(member_id)
            if entry is None or entry.price.work_s > saved_s:
                continue
            if member_id in self._seen or queue.is_to_wait(member_id):
                continue
            # The longer an answer against its prompt, the better decoding hides behind prefill.
            decode = queue.lengths.total(member, 0.5)
            found.append((entry.price.work_s / decode, member_id))
        found.sort()
        return [member_id for _, member_id in found]
