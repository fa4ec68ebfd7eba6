"""A cost model of times that were measured, where a roofline says too little about a machine.

The seconds of a forward pass are linear in what the pass does: requests, tokens, pairs of tokens
that attend to each other, cached tokens that are read. `benchmark/simulation/measure.py` fits
the coefficients to a running server.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from tiered_kv.core.device_spec import DeviceSpec
from tiered_kv.core.errors import ConfigError
from tiered_kv.core.model_spec import ModelSpec
from tiered_kv.scheduler.cost_model import Correction, CostModel, Edge, EdgeCost


@dataclass(frozen=True, slots=True, kw_only=True)
class PassTimes:
    """Seconds of forward passes: a fixed part, and what each unit of work adds."""

    prefill_fixed_s: float
    """Of a pass that prefills."""
    prefill_request_s: float
    """Per request in it."""
    prefill_token_s: float
    """Per token computed."""
    prefill_pair_s: float
    """Per pair of a computed token and one it attends to."""
    prefill_cached_s: float
    """Per cached token before the computed ones."""
    decode_fixed_s: float
    """Of a pass that only decodes."""
    decode_request_s: float
    """Per request in it."""
    decode_context_s: float
    """Per token of their contexts together."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(
                    f"Measured times need a {field.name} of at least 0, not {value}; measure anew."
                )

    def prefill_s(self, prefills: Sequence[tuple[int, int]]) -> float:
        """A pass over chunks of (new, cached) tokens, without its fixed part."""
        seconds = self.prefill_request_s * len(prefills)
        for new, cached in prefills:
            seconds += (
                self.prefill_token_s * new
                + self.prefill_pair_s * new * (cached + (new + 1) / 2.0)
                + self.prefill_cached_s * cached
            )
        return seconds

    def decode_s(self, context_tokens: int, n_decodes: int) -> float:
        """A decode pass, without its fixed part."""
        return self.decode_request_s * n_decodes + self.decode_context_s * context_tokens

    def prefill_pass_s(self, prefills: Sequence[tuple[int, int]]) -> float:
        """A whole pass that prefills chunks of (new, cached) tokens."""
        return self.prefill_fixed_s + self.prefill_s(prefills)

    def decode_pass_s(self, context_tokens: int, n_decodes: int) -> float:
        """A whole pass that only decodes."""
        return self.decode_fixed_s + self.decode_s(context_tokens, n_decodes)


class MeasuredCosts(CostModel):
    """`CostModel` with measured passes in place of the roofline.

    The fixed parts are corrections, as the roofline's are, so that calibration (`calibration.py`)
    goes on from what was measured. A pass of both kinds takes the sum of both and the larger fixed
    part until one was observed: an assumption, as passes are measured with one kind only.
    """

    def __init__(
        self,
        model: ModelSpec,
        device: DeviceSpec,
        edges: Mapping[Edge, EdgeCost],
        times: PassTimes,
    ) -> None:
        super().__init__(model, device, edges)
        self._times = times
        self.prefill_correction = Correction(times.prefill_fixed_s)
        self.decode_correction = Correction(times.decode_fixed_s)

    def prefill_s(self, new_tokens: int, cached_tokens: int = 0) -> float:
        if new_tokens <= 0:
            return 0.0
        seconds = self._times.prefill_s(((new_tokens, cached_tokens),))
        return self.prefill_correction.fixed_s + self.prefill_correction.scale * seconds

    def marginal_prefill_s(self, new_tokens: int, cached_tokens: int = 0) -> float:
        if new_tokens <= 0:
            return 0.0
        seconds = self._times.prefill_s(((new_tokens, cached_tokens),))
        return self.prefill_correction.scale * (seconds - self._times.prefill_request_s)

    def iteration_s(
        self,
        prefills: Sequence[tuple[int, int]],
        decode_contexts_tokens: int,
        n_decodes: int,
        shared_tokens_saved: int = 0,
    ) -> float:
        if prefills and n_decodes and self.mixed_correction is not None:
            fixed_s, scale = self.mixed_correction
            return fixed_s + scale * self.roofline_s(
                prefills, decode_contexts_tokens, n_decodes, shared_tokens_saved
            )
        fixed_s = seconds = 0.0
        if prefills:
            fixed_s = self.prefill_correction.fixed_s
            seconds = self.prefill_correction.scale * self._times.prefill_s(prefills)
        if n_decodes:
            fixed_s = max(fixed_s, self.decode_correction.fixed_s)
            read_tokens = max(0, decode_contexts_tokens - shared_tokens_saved)
            decode_s = self._times.decode_s(read_tokens, n_decodes)
            seconds += self.decode_correction.scale * decode_s
        return fixed_s + seconds

    def roofline_s(
        self,
        prefills: Sequence[tuple[int, int]],
        decode_contexts_tokens: int,
        n_decodes: int,
        shared_tokens_saved: int = 0,
    ) -> float:
        read_tokens = max(0, decode_contexts_tokens - shared_tokens_saved)
        return self._times.prefill_s(prefills) + self._times.decode_s(read_tokens, n_decodes)
