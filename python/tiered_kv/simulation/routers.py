"""How a gateway spreads requests over the servers of a fleet.

It sees prompts and who has how many requests, not what servers have cached: as gateways do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tiered_kv.core.errors import ConfigError
from tiered_kv.simulation.engine import Router
from tiered_kv.simulation.instance import Instance
from tiered_kv.simulation.workload.request import Request

ROUTINGS = ("cache-aware", "session", "random")

CACHE_THRESHOLD = 0.3
"""A prompt goes to the server that was sent this share of it before: smg's --cache-threshold,"""
BALANCE_ABS = 64
"""unless the busiest has so many requests more than the idlest: --balance-abs-threshold,"""
BALANCE_REL = 1.5
"""and so many times as many: --balance-rel-threshold."""


Present = Callable[[float, int], range]
"""Which of so many servers, by index, get requests at a time."""


def everybody(now_s: float, n_servers: int) -> range:  # noqa: ARG001
    """All of them, always."""
    return range(n_servers)


def one_for_another(every_s: float, n_present: int) -> Present:
    """The oldest of `n_present` servers goes each `every_s` seconds, and a new one comes.

    Who goes gets no more requests, and finishes what it has.
    """

    def present(now_s: float, n_servers: int) -> range:
        first = min(int(now_s / every_s), n_servers - n_present)
        return range(first, first + n_present)

    return present


def make_router(name: str, seed: int = 0, present: Present = everybody) -> Router:
    """A new router. Raises ConfigError for an unknown name."""
    if name == "random":
        random = np.random.default_rng([seed, 17])

        def anywhere(request: Request, instances: Sequence[Instance]) -> int:
            servers = present(request.arrival_s, len(instances))
            return servers[int(random.integers(len(servers)))]

        return anywhere
    if name == "session":
        return SessionRouter(present)
    if name == "cache-aware":
        return CacheAwareRouter(present)
    raise ConfigError(f"There is no routing {name!r}; the known ones are {', '.join(ROUTINGS)}.")


class SessionRouter:
    """A conversation stays where it began: at the server that had the fewest requests then.

    If that has gone it begins anew.
    """

    def __init__(self, present: Present = everybody) -> None:
        self._present = present
        self._server_of: dict[int, int] = {}

    def __call__(self, request: Request, instances: Sequence[Instance]) -> int:
        """Its server, by index."""
        servers = self._present(request.arrival_s, len(instances))
        if request.session is None:
            return _idlest(instances, servers)
        server = self._server_of.get(request.session)
        if server is None or server not in servers:
            server = self._server_of[request.session] = _idlest(instances, servers)
        return server


class CacheAwareRouter:
    """To the server that was last sent the longest part of the prompt, as long as none is swamped.

    As smg's policy of that name, with one server remembered for each block.
    """

    def __init__(self, present: Present = everybody) -> None:
        self._present = present
        self._server_of: dict[int, int] = {}

    def __call__(self, request: Request, instances: Sequence[Instance]) -> int:
        """Its server, by index."""
        server = self._choose(request, instances)
        for block in request.blocks:
            self._server_of[block] = server
        return server

    def _choose(self, request: Request, instances: Sequence[Instance]) -> int:
        known, servers = self._server_of, self._present(request.arrival_s, len(instances))
        for n_known in range(len(request.blocks), 0, -1):
            server = known.get(request.blocks[n_known - 1])
            if server is None or server not in servers:
                continue
            if n_known < CACHE_THRESHOLD * len(request.blocks):
                break
            is_swamped = _is_imbalanced(instances, servers)
            return _idlest(instances, servers) if is_swamped else server
        return _idlest(instances, servers)


def _idlest(instances: Sequence[Instance], servers: range) -> int:
    return min(servers, key=lambda index: instances[index].n_open)


def _is_imbalanced(instances: Sequence[Instance], servers: range) -> bool:
    loads = [instances[index].n_open for index in servers]
    least, most = min(loads), max(loads)
    return most - least > BALANCE_ABS and most > BALANCE_REL * least
