"""Arrivals spread over the resolution of a trace's clock.

Mooncake's traces have a resolution of three seconds: ten requests arrive in one instant, then none
for three seconds. Replayed as they stand they show bursts that the service never saw.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from tiered_kv.simulation.workload.errors import WorkloadError
from tiered_kv.simulation.workload.request import Request, Workload


class SpreadWorkload:
    """`inner` with each initial arrival delayed by a uniform share of `spread_s` seconds."""

    def __init__(self, inner: Workload, spread_s: float, seed: int = 0) -> None:
        """Raises WorkloadError unless `spread_s` is at least 0."""
        if not spread_s >= 0:
            raise WorkloadError(f"Arrivals can't be spread over {spread_s} s; use at least 0.")
        self.name = inner.name
        self.block_tokens = inner.block_tokens
        self._inner = inner
        self._spread_s = spread_s
        self._seed = seed

    def initial(self) -> Iterator[Request]:
        """All initial requests by their new arrival."""
        random = np.random.default_rng([self._seed, 11])
        requests = list(self._inner.initial())
        delays_s = random.random(len(requests)) * self._spread_s
        delayed = [
            replace(request, arrival_s=request.arrival_s + float(delay_s))
            for request, delay_s in zip(requests, delays_s, strict=True)
        ]
        delayed.sort(key=lambda request: request.arrival_s)
        return iter(delayed)

    def follow_up(self, finished: Request, finish_s: float) -> Request | None:
        """What the inner workload says."""
        return self._inner.follow_up(finished, finish_s)
