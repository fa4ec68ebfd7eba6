"""How long forward passes take: the cost model, with noise if wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tiered_kv.scheduler.cost_model import CostModel

FloatArray = npt.NDArray[np.float64]


@dataclass(slots=True)
class DecodeRun:
    """Decode passes in a row over the same requests."""

    ends_s: FloatArray
    start_s: float
    event: int


class Execution:
    """Durations in seconds. Noise is log-normal with mean 1, independent from pass to pass."""

    def __init__(self, costs: CostModel, *, noise: float = 0.0, seed: int = 0) -> None:
        """`noise`: standard deviation of the logarithm of a pass's duration; 0 switches it off."""
        self.costs = costs
        self._noise = noise
        self._random = np.random.default_rng(seed)

    def iteration_s(
        self,
        prefills: Sequence[tuple[int, int]],
        decode_context_tokens: int,
        n_decodes: int,
        saved_tokens: int = 0,
    ) -> float:
        """One pass over prefill chunks, (new, cached) tokens each, and decoding requests.

        `saved_tokens` of the contexts need not be read, being shared.
        """
        seconds = self.costs.iteration_s(prefills, decode_context_tokens, n_decodes, saved_tokens)
        return seconds * float(self._factors(1)[0]) if self._noise else seconds

    def decode_ends_s(
        self,
        start_s: float,
        context_tokens: int,
        n_decodes: int,
        n_steps: int,
        saved_tokens: int = 0,
    ) -> FloatArray:
        """When each of `n_steps` decode passes in a row ends, the contexts growing by the way.

        The cost model is asked for the first and the last pass and interpolated between: it is
        linear in the context as long as the same side of the roofline binds.
        """
        first_s = self.costs.iteration_s((), context_tokens, n_decodes, saved_tokens)
        if n_steps == 1:
            durations = np.array([first_s])
        else:
            last_context = context_tokens + (n_steps - 1) * n_decodes
            last_s = self.costs.iteration_s((), last_context, n_decodes, saved_tokens)
            durations = np.linspace(first_s, last_s, n_steps)
        if self._noise:
            durations *= self._factors(n_steps)
        np.cumsum(durations, out=durations)
        durations += start_s
        return durations

    def _factors(self, n: int) -> FloatArray:
        sigma = self._noise
        return self._random.lognormal(-sigma * sigma / 2.0, sigma, n)
