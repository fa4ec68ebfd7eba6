"""What one simulated server takes its machine for, and how it learns better.

The machine is one cost model (`InstanceSettings.costs`), what policies ask is another: it may start
wrong, and goes on as a server's does, by the server's own calibrator, from what a server would
observe.
"""

from __future__ import annotations

from collections.abc import Sequence

from tiered_kv.scheduler.calibration import DECODES_PER_OBSERVATION, Calibrator
from tiered_kv.simulation.execution import FloatArray
from tiered_kv.simulation.links import EDGES
from tiered_kv.simulation.settings import InstanceSettings


class Believed:
    """The cost model that policies ask."""

    def __init__(self, settings: InstanceSettings) -> None:
        self.costs = settings.believed()
        self._calibrator = Calibrator(self.costs) if settings.belief.learns else None
        self._n_decodes = 0

    def prefilled(
        self,
        prefills: Sequence[tuple[int, int]],
        seconds: float,
        context_tokens: int,
        n_decodes: int,
        saved_tokens: int,
    ) -> None:
        """A pass over prefill chunks, and decodes beside them, takes `seconds` and no load's."""
        if self._calibrator is not None:
            self._calibrator.observe_step(
                prefills, context_tokens, n_decodes, seconds, saved_tokens
            )

    def decoded(
        self, ends_s: FloatArray, start_s: float, context_tokens: int, n: int, saved: int
    ) -> None:
        """Passes in a row over `n` requests are over; context_tokens: before the first of them."""
        if self._calibrator is None:
            return
        first = DECODES_PER_OBSERVATION - 1 - self._n_decodes % DECODES_PER_OBSERVATION
        for at in range(first, len(ends_s), DECODES_PER_OBSERVATION):
            begun_s = float(ends_s[at - 1]) if at else start_s
            seconds = float(ends_s[at]) - begun_s
            self._calibrator.observe_step((), context_tokens + at * n, n, seconds, saved)
        self._n_decodes += len(ends_s)

    def transferred(self, link: str, start_s: float, end_s: float, n_bytes: int) -> None:
        """A transfer is over: an observer of links."""
        if self._calibrator is not None and n_bytes:
            self._calibrator.observe_transfer(*EDGES[link], n_bytes, end_s - start_s)
