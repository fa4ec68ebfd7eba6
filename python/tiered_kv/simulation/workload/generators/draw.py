"""Random lengths, pauses and choices that the generators share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tiered_kv.simulation.workload.errors import WorkloadError


@dataclass(frozen=True, slots=True)
class LogNormal:
    """Long-tailed positive numbers, as message lengths and thinking times are."""

    median: float
    sigma: float
    """Standard deviation of the logarithm; 0 always gives the median."""
    low: float = 0.0
    high: float = float("inf")

    def draw(self, rng: np.random.Generator) -> float:
        """One number, cut to [low, high]."""
        return min(self.high, max(self.low, self.median * float(np.exp(self.sigma * rng.normal()))))

    def tokens(self, rng: np.random.Generator) -> int:
        """One whole number, at least 1."""
        return max(1, round(self.draw(rng)))


def zipf_choice(n: int, exponent: float) -> NDArray[np.float64]:
    """Probabilities of `n` things whose k-th has a popularity of k ** -exponent."""
    weights = np.arange(1, n + 1, dtype=np.float64) ** -exponent
    return np.asarray(weights / weights.sum(), dtype=np.float64)


def generator(seed: int, *stream: int) -> np.random.Generator:
    """Independent numbers for each `stream`, so that one length changes no other session."""
    return np.random.default_rng([seed, *stream])


def require(condition: bool, sentence: str) -> None:
    """Raise WorkloadError with `sentence` unless `condition` holds."""
    if not condition:
        raise WorkloadError(sentence)


def require_positive(options: object, *names: str) -> None:
    """Raise WorkloadError unless all these fields of `options` are over 0."""
    for name in names:
        value = getattr(options, name)
        require(value > 0, f"A {type(options).__name__} workload needs {name} over 0, not {value}.")
