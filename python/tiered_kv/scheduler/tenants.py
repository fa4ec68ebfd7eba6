"""Fairness between tenants: the same work for all who want it, as in start-time fair queueing.

Each tenant has a virtual time, the work it was given; who is behind goes first. A
tenant that had nothing waiting does not save up: it starts at the virtual time of the one furthest
behind (Goyal et al., SIGCOMM 1996).

One that was never heard of starts at the virtual time of the one furthest *ahead*, so that a new
name is no way out of what one was given; and only so many names count: all others share one queue
as if they were one tenant. Whoever uses many names at once still gets the share of as many, so
whose word counts for a name is the operator's choice (docs/slo.md).
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping

from tiered_kv.scheduler.ordered import OrderedIds

#: A tenant this many seconds of work ahead of the last counts half.
LEAD_HALF_S = 10.0
#: Tenants that have a virtual time of their own, waiting or not.
TENANTS_MAX = 1024
#: What all others are together. No tenant can be called so: a name has 64 characters at most.
OTHERS = "others " * 10


class TenantShares:
    """Waiting requests of each tenant in the order of their keys."""

    def __init__(self) -> None:
        self._queues: dict[str, OrderedIds] = {}
        self._tenant_of: dict[int, str] = {}
        self._virtual_s: dict[str, float] = {}
        # (virtual time, tenant) of those with a queue, in order.
        self._waiting: list[tuple[float, str]] = []
        # Tenants without a queue, the one that had one least recently first.
        self._idle: dict[str, None] = {}
        # The virtual time of who was given most: where nobody waits, it is now.
        self._now_s = 0.0

    def __len__(self) -> int:
        return len(self._tenant_of)

    def put(self, tenant: str, request_id: int, key: float) -> None:
        """It waits with this key, or has another from now on."""
        name = self._tenant_of.get(request_id)
        if name is None:
            name = self._tenant_of[request_id] = self._known(tenant)
        queue = self._queues.get(name)
        if queue is None:
            queue = self._queues[name] = OrderedIds()
            self._idle.pop(name, None)
            self._virtual_s[name] = max(self._virtual_s[name], self._behind_s())
            insort(self._waiting, (self._virtual_s[name], name))
        queue.put(request_id, key)

    def discard(self, request_id: int) -> None:
        """It is not here any more."""
        name = self._tenant_of.pop(request_id, None)
        if name is None:
            return
        queue = self._queues[name]
        queue.discard(request_id)
        if not queue:
            del self._queues[name]
            self._stop_waiting(name)
            self._idle[name] = None

    def charge(self, tenant: str, work_s: float) -> None:
        """`tenant` was given this much work, from this queue or another."""
        name = self._known(tenant)
        virtual_s = self._virtual_s[name]
        is_waiting = name in self._queues
        if is_waiting:
            self._stop_waiting(name)
        self._virtual_s[name] = virtual_s + work_s
        self._now_s = max(self._now_s, self._virtual_s[name])
        if is_waiting:
            insort(self._waiting, (self._virtual_s[name], name))

    def weight(self, tenant: str) -> float:
        """1 for who is not ahead of the others; less for who is."""
        virtual_s = self._virtual_s.get(tenant)
        if virtual_s is None:
            virtual_s = self._virtual_s.get(OTHERS, self._ahead_s())
        return LEAD_HALF_S / (LEAD_HALF_S + max(0.0, virtual_s - self._behind_s()))

    def merged(self, keys: Mapping[int, float], tenants: Mapping[int, str]) -> Iterator[int]:
        """All ids, and those of `keys` with them; among tenants, who is behind first.

        As if nothing were charged meanwhile, so a tenant's requests stay together. Read as far as
        is needed; must not be changed meanwhile.
        """
        more: dict[str, list[tuple[float, int]]] = {}
        for request_id, key in keys.items():
            more.setdefault(tenants[request_id], []).append((key, request_id))
        ahead_s = self._ahead_s()
        only_more = sorted(
            (self._virtual_s.get(name, ahead_s), name) for name in more if name not in self._queues
        )
        for _, name in heapq.merge(self._waiting, only_more):
            queue = self._queues.get(name) or OrderedIds()
            own = ((queue.key(request_id), request_id) for request_id in queue)
            for _, request_id in heapq.merge(own, sorted(more.get(name, ()))):
                yield request_id

    def _known(self, tenant: str) -> str:
        """The name under which `tenant` has a virtual time, from now on if it had none."""
        if tenant in self._virtual_s:
            return tenant
        if len(self._virtual_s) >= TENANTS_MAX and self._idle:
            forgotten = next(iter(self._idle))
            del self._idle[forgotten], self._virtual_s[forgotten]
        name = tenant if len(self._virtual_s) < TENANTS_MAX else OTHERS
        if name not in self._virtual_s:
            self._virtual_s[name] = self._ahead_s()
            self._idle[name] = None
        return name

    def _behind_s(self) -> float:
        return self._waiting[0][0] if self._waiting else self._now_s

    def _ahead_s(self) -> float:
        return max(self._waiting[-1][0] if self._waiting else 0.0, self._now_s)

    def _stop_waiting(self, name: str) -> None:
        del self._waiting[bisect_left(self._waiting, (self._virtual_s[name], name))]
