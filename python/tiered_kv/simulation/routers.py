"""How a gateway spreads requests over the servers of a fleet.

It sees prompts and who has how many requests, not what servers have cached: as gateways do.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def make_router(name: str, seed: int = 0) -> Router:
    """A new router. Raises ConfigError for an unknown name."""
    if name == "random":
        random = np.random.default_rng([seed, 17])
        return lambda request, instances: int(random.integers(len(instances)))  # noqa: ARG005
    if name == "session":
        return SessionRouter()
    if name == "cache-aware":
        return CacheAwareRouter()
    raise ConfigError(f"There is no routing {name!r}; the known ones are {', '.join(ROUTINGS)}.")


class SessionRouter:
    """A conversation stays where it began: at the server that had the fewest requests then."""

    def __init__(self) -> None:
        self._server_of: dict[int, int] = {}

    def __call__(self, request: Request, instances: Sequence[Instance]) -> int:
        """Its server, by index."""
        if request.session is None:
            return _idlest(instances)
        server = self._server_of.get(request.session)
        if server is None:
            server = self._server_of[request.session] = _idlest(instances)
        return server


class CacheAwareRouter:
    """To the server that was last sent the longest part of the prompt, as long as none is swamped.

    As smg's policy of that name, with one server remembered for each block.
    """

    def __init__(self) -> None:
        self._server_of: dict[int, int] = {}

    def __call__(self, request: Request, instances: Sequence[Instance]) -> int:
        """Its server, by index."""
        server = self._choose(request, instances)
        for block in request.blocks:
            self._server_of[block] = server
        return server

    def _choose(self, request: Request, instances: Sequence[Instance]) -> int:
        known = self._server_of
        for n_known in range(len(request.blocks), 0, -1):
            server = known.get(request.blocks[n_known - 1])
            if server is None:
                continue
            if n_known < CACHE_THRESHOLD * len(request.blocks):
                break
            return _idlest(instances) if _is_imbalanced(instances) else server
        return _idlest(instances)


def _idlest(instances: Sequence[Instance]) -> int:
    return min(range(len(instances)), key=lambda index: instances[index].n_open)


def _is_imbalanced(instances: Sequence[Instance]) -> bool:
    loads = [instance.n_open for instance in instances]
    least, most = min(loads), max(loads)
    return most - least > BALANCE_ABS and most > BALANCE_REL * least
