"""Fairness between tenants: work in proportion to weights, as in start-time fair queueing.

Each tenant has a virtual time, the work it was given over its weight; who is behind goes first. A
tenant that had nothing waiting does not save up: it starts at the virtual time of the one furthest
behind (Goyal et al., SIGCOMM 1996).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping

from tiered_kv.scheduler.ordered import OrderedIds

#: A tenant this many weighted seconds of work ahead of the last counts half.
LEAD_HALF_S = 10.0
#: Tenants with nothing waiting that are remembered: clients name them, so there is no end to them.
IDLE_MAX = 1024


class TenantShares:
    """Waiting requests of each tenant in the order of their keys."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = dict(weights)
        self._queues: dict[str, OrderedIds] = {}
        self._tenant_of: dict[int, str] = {}
        self._virtual_s: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._tenant_of)

    def put(self, tenant: str, request_id: int, key: float) -> None:
        """It waits with this key, or has another from now on."""
        queue = self._queues.get(tenant)
        if queue is None:
            queue = self._queues[tenant] = OrderedIds()
        if not queue:
            self._join(tenant)
        queue.put(request_id, key)
        self._tenant_of[request_id] = tenant

    def discard(self, request_id: int) -> None:
        """It is not here any more."""
        tenant = self._tenant_of.pop(request_id, None)
        if tenant is None:
            return
        queue = self._queues[tenant]
        queue.discard(request_id)
        if not queue:
            del self._queues[tenant]

    def charge(self, tenant: str, work_s: float) -> None:
        """`tenant` was given this much work, from this queue or another."""
        if tenant not in self._virtual_s:
            self._join(tenant)
        self._virtual_s[tenant] += work_s / self._weights.get(tenant, 1.0)
        if len(self._virtual_s) - len(self._queues) > 2 * IDLE_MAX:
            self._forget()

    def weight(self, tenant: str) -> float:
        """1 for who is not ahead of the others; less for who is."""
        virtual = self._virtual_s
        if len(virtual) <= 1 or tenant not in virtual:
            return 1.0
        return LEAD_HALF_S / (LEAD_HALF_S + virtual[tenant] - min(virtual.values()))

    def merged(self, keys: Mapping[int, float], tenants: Mapping[int, str]) -> Iterator[int]:
        """All ids, and those of `keys` with them; among tenants, who is behind first.

        As if nothing were charged meanwhile, so a tenant's requests stay together. Must not be
        changed while it is read.
        """
        more: dict[str, list[tuple[float, int]]] = {}
        for request_id, key in keys.items():
            more.setdefault(tenants[request_id], []).append((key, request_id))
        everyone = {*(name for name, queue in self._queues.items() if queue), *more}
        for name in sorted(everyone, key=lambda n: (self._virtual_s.get(n, 0.0), n)):
            queue = self._queues.get(name) or OrderedIds()
            own = ((queue.key(request_id), request_id) for request_id in queue)
            for _, request_id in heapq.merge(own, sorted(more.get(name, ()))):
                yield request_id

    def _forget(self) -> None:
        """Leave IDLE_MAX idle tenants: those furthest ahead, who would gain most by it."""
        idle = sorted(
            (name for name in self._virtual_s if name not in self._queues),
            key=lambda name: (self._virtual_s[name], name),
        )
        for name in idle[:-IDLE_MAX]:
            del self._virtual_s[name]

    def _join(self, tenant: str) -> None:
        behind = [
            self._virtual_s[name]
            for name, queue in self._queues.items()
            if queue and name != tenant and name in self._virtual_s
        ]
        start_s = min(behind, default=0.0)
        self._virtual_s[tenant] = max(self._virtual_s.get(tenant, 0.0), start_s)
