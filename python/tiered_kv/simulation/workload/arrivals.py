"""When sessions and requests start: arrival processes with a stated rate and burstiness."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tiered_kv.simulation.workload.errors import WorkloadError

_FORMS = "poisson:RATE, gamma:RATE:CV, uniform:RATE or at-once"


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Gamma-distributed gaps of mean 1 / `rate`.

    `cv` is the gaps' coefficient of variation: 1 makes the Poisson process, more makes bursts
    (BurstGPT, arXiv 2401.17644, fits production traffic so), 0 makes equal gaps.
    """

    rate: float
    """Arrivals per second; infinite for all at once."""

    cv: float = 1.0

    def times(self, n: int, rng: np.random.Generator) -> NDArray[np.float64]:
        """`n` ascending times in seconds; the first gap begins at 0."""
        if math.isinf(self.rate):
            return np.zeros(n)
        mean_s = 1 / self.rate
        if self.cv == 0:
            return np.arange(n, dtype=np.float64) * mean_s
        shape = 1 / self.cv**2
        return np.cumsum(rng.gamma(shape, mean_s / shape, n), dtype=np.float64)


def parse_arrivals(text: str) -> Arrivals:
    """Arrivals written as "poisson:2", "gamma:2:3", "uniform:2" (per second) or "at-once".

    Raises WorkloadError naming these forms.
    """
    kind, *numbers = text.split(":")
    try:
        values = [float(number) for number in numbers]
    except ValueError:
        values = []
    if kind == "at-once" and not numbers:
        return Arrivals(math.inf)
    if not values or len(values) != len(numbers) or not all(0 < v < math.inf for v in values):
        raise WorkloadError(f"{text!r} is no arrival process; write {_FORMS}, with numbers over 0.")
    if kind == "poisson" and len(values) == 1:
        return Arrivals(values[0])
    if kind == "uniform" and len(values) == 1:
        return Arrivals(values[0], cv=0.0)
    if kind == "gamma" and len(values) == 2:
        return Arrivals(values[0], cv=values[1])
    raise WorkloadError(f"{text!r} is no arrival process; write {_FORMS}.")
