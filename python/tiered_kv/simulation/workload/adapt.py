"""Any workload, made faster, shorter or smaller, with service classes assigned."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice

from tiered_kv.simulation.workload.block_ids import blocks_spanned
from tiered_kv.simulation.workload.errors import WorkloadError
from tiered_kv.simulation.workload.request import Request, Workload
from tiered_kv.simulation.workload.slo_mix import SloMix, UnloadedPrefill


@dataclass(frozen=True, slots=True, kw_only=True)
class Adaptation:
    """What to change in a workload; the defaults change nothing."""

    rate: float = 1.0
    """Arrivals come this many times as fast."""

    length: Fraction = Fraction(1)
    """All lengths, and the block, are multiplied by this; reuse stays the same, block for block."""

    pause: float = 1.0
    """Pauses within a session are multiplied by this."""

    limit: int | None = None
    """Only so many of the initial requests, with all that follows from them."""

    slo_mix: SloMix | None = None
    """Assigns service classes; None leaves those that the workload has."""

    seed: int = 0
    """For the service classes."""

    def __post_init__(self) -> None:
        for field, value in (("rate", self.rate), ("length", self.length)):
            if not (value > 0 and math.isfinite(value)):
                raise WorkloadError(f"The {field} scale must be over 0, not {value}.")
        if not (self.pause >= 0 and math.isfinite(self.pause)):
            raise WorkloadError(f"The pause scale must be at least 0, not {self.pause}.")
        if self.limit is not None and self.limit < 1:
            raise WorkloadError(f"The limit must be at least 1 request, not {self.limit}.")


class AdaptedWorkload:
    """`inner` seen through an `Adaptation`."""

    def __init__(
        self,
        inner: Workload,
        adaptation: Adaptation,
        unloaded_s: UnloadedPrefill | None = None,
    ) -> None:
        """unloaded_s: needed where objectives scale with the prompt.

        Raises WorkloadError if it is missing, or the scaled block has no whole number of tokens.
        """
        mix = adaptation.slo_mix
        if mix is not None and mix.is_scaled and unloaded_s is None:
            raise WorkloadError(
                "Objectives that scale with the prompt need a simulated server; give fixed ones."
            )
        self._unloaded_s = unloaded_s
        scaled = inner.block_tokens * adaptation.length
        if scaled.denominator != 1:
            raise WorkloadError(
                f"Lengths scaled by {adaptation.length} turn blocks of {inner.block_tokens} tokens "
                f"into {float(scaled):g}; choose a scale that leaves a whole number, such as "
                f"1/{inner.block_tokens}."
            )
        self.name = inner.name
        self.block_tokens = int(scaled)
        self.inner = inner
        self._change = adaptation

    def initial(self) -> Iterator[Request]:
        """The first `limit` initial requests, sooner and shorter."""
        for request in islice(self.inner.initial(), self._change.limit):
            yield self._adapted(request, request.arrival_s / self._change.rate)

    def follow_up(self, finished: Request, finish_s: float) -> Request | None:
        """What the inner workload says, sooner and shorter."""
        request = self.inner.follow_up(finished, finish_s)
        if request is None:
            return None
        pause_s = (request.arrival_s - finish_s) * self._change.pause
        return self._adapted(request, finish_s + pause_s)

    def _adapted(self, request: Request, arrival_s: float) -> Request:
        input_tokens = self._scaled(request.input_tokens)
        end_tokens = self._scaled(request.input_tokens + request.output_tokens)
        hint_s = request.next_use_hint_s
        adapted = replace(
            request,
            arrival_s=arrival_s,
            input_tokens=input_tokens,
            # Scaled by its end, so that prompt and output together fill the blocks they filled.
            output_tokens=max(1, end_tokens - input_tokens),
            blocks=self._cut(request.blocks, input_tokens),
            next_use_hint_s=None if hint_s is None else hint_s * self._change.pause,
        )
        mix = self._change.slo_mix
        if mix is not None:
            slo = mix.slo_of(adapted, self._change.seed, self._unloaded_s)
            adapted.slo_class = slo.name
            adapted.ttft_slo_s = slo.ttft_s
            adapted.tbt_slo_s, adapted.task_slo_s = slo.tbt_s, slo.task_s
            adapted.priority = mix.priority(mix.assign(request, self._change.seed))
        return adapted

    def _scaled(self, n_tokens: int) -> int:
        # Rounded down: then as many blocks are full as before.
        return max(1, math.floor(n_tokens * self._change.length))

    def _cut(self, blocks: array[int], n_tokens: int) -> array[int]:
        """Without the last, partial block if nothing of it is left."""
        return blocks[: blocks_spanned(n_tokens, self.block_tokens)]
