"""Learns what the roofline does not know, from the step and transfer times a server observes.

Observed seconds are fitted as `fixed + scale * predicted` by least squares over relative errors,
with older observations forgotten exponentially. A step that stalled (another process, a garbage
collection) is pulled in to what the recent scatter makes plausible, and no single observation may
move a parameter by more than a factor; so the fit is neither thrown off by outliers nor kept from
following a change. Deterministic: equal observations give equal parameters on every rank.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from tiered_kv.core.ids import Tier
from tiered_kv.scheduler.cost_model import Correction, CostModel

#: An observation counts half after about 45 more: `0.985 ** 45 == 0.5`.
FORGETTING = 0.985
#: Old observations go quicker while half of the recent ones miss by more than this logarithm.
FORGETTING_WHEN_WRONG = 0.8
WRONG = 0.3
#: How much the fit clings to the scale it believed before, in observations.
INERTIA = 0.1
#: And to the fixed part. As long as all steps are alike, nothing tells one from the other; then the
#: machine is slower or faster than was believed, it does not have other fixed costs.
FIXED_INERTIA = 10.0
#: No update moves a parameter by more than this factor; the first ones may move it further.
STEP_MAX = 1.5
FIRST_STEP_MAX = 4.0
N_FIRST = 16
#: No machine computes faster than it was believed to by more than this. Where passes are so short
#: that their sizes explain nothing, all of their time would be taken for fixed in the end, and work
#: for free: what a second of it takes would have no meaning.
SCALE_LEAST = 0.01
#: Observations further off than this many times the median recent deviation are pulled in ...
PLAUSIBLE_DEVIATIONS = 4.0
#: ... but never those within this (natural) logarithm of the prediction.
DEVIATION_MIN = 0.1
#: Times outside teach nothing: below is the noise of a clock, above is not a step.
SECONDS_MIN, SECONDS_MAX = 1e-6, 1e4
#: A pass counts as one kind if that kind makes up this share of its roofline.
PURE_SHARE = 0.9
#: Of passes that only decode, one in so many is to be observed: they resemble one another.
DECODES_PER_OBSERVATION = 8
#: What was learned of passes of both kinds is forgotten after so many prefills without one: where
#: it speaks against them, nothing else would ever correct it.
MIXED_FORGOTTEN = 200


class AffineFit:
    """observed = fixed + scale * predicted, both non-negative; `scale` stays positive.

    fixed, scale: what is believed before anything was observed; the scale becomes no less than
    `least_share` of it.
    """

    def __init__(self, fixed_s: float, scale: float = 1.0, least_share: float = 0.0) -> None:
        self.fixed_s = fixed_s
        self.scale = scale
        self._least_scale = least_share * scale
        self.n_observations = 0
        # Weighted sums of 1, x, y, x*x, x*y, each over y*y: errors count relative to y.
        self._sums = [0.0] * 5
        self._deviations: deque[float] = deque(maxlen=15)

    def predict(self, predicted_s: float) -> float:
        """Seconds, for a model that predicts `predicted_s`."""
        return self.fixed_s + self.scale * predicted_s

    def observe(self, predicted_s: float, observed_s: float) -> None:
        """One observation. Those that are not times of a step or transfer are ignored."""
        # Written so that a NaN fails it.
        if not (
            SECONDS_MIN <= observed_s <= SECONDS_MAX and SECONDS_MIN <= predicted_s <= SECONDS_MAX
        ):
            return
        x, y = predicted_s, self._plausible(predicted_s, observed_s)
        weight = 1.0 / (y * y)
        terms = (weight, weight * x, weight * y, weight * x * x, weight * x * y)
        keep = FORGETTING if median(self._deviations) < WRONG else FORGETTING_WHEN_WRONG
        self._sums = [keep * old + new for old, new in zip(self._sums, terms, strict=True)]
        fixed_s, scale = self._solve(weight, x)
        factor = FIRST_STEP_MAX if self.n_observations < N_FIRST else STEP_MAX
        # Part of what was observed, so that it can leave zero.
        limit = max(self.fixed_s * (factor - 1.0), y / 4)
        self.fixed_s = min(max(fixed_s, self.fixed_s - limit, 0.0), self.fixed_s + limit)
        scale = min(max(scale, self.scale / factor), self.scale * factor)
        self.scale = max(scale, self._least_scale)
        self.n_observations += 1

    def _plausible(self, x: float, y: float) -> float:
        """`y`, pulled in to what the scatter of late makes plausible."""
        expected = max(self.predict(x), SECONDS_MIN)
        deviation = math.log(y / expected)
        limit = DEVIATION_MIN
        if self._deviations:
            limit = max(limit, PLAUSIBLE_DEVIATIONS * median(self._deviations))
        else:
            limit = math.inf
        self._deviations.append(abs(deviation))
        return expected * math.exp(min(max(deviation, -limit), limit))

    def _solve(self, weight: float, x: float) -> tuple[float, float]:
        """The least squares, drawn a little to the present parameters: (fixed_s, scale)."""
        n, sx, sy, sxx, sxy = self._sums
        # Without scatter in x, only the sum of both terms is known: inertia decides their share.
        pull_fixed, pull_scale = FIXED_INERTIA * weight, INERTIA * weight * x * x
        a11, a12, a22 = n + pull_fixed, sx, sxx + pull_scale
        b1, b2 = sy + pull_fixed * self.fixed_s, sxy + pull_scale * self.scale
        determinant = a11 * a22 - a12 * a12
        if determinant <= 1e-12 * a11 * a22:
            return self.fixed_s, (sxy - self.fixed_s * sx) / sxx
        fixed_s = (b1 * a22 - b2 * a12) / determinant
        scale = (a11 * b2 - a12 * b1) / determinant
        if fixed_s < 0:
            fixed_s, scale = 0.0, b2 / a22
        elif scale <= 0:
            fixed_s, scale = b1 / a11, 0.0
        return fixed_s, scale


@dataclass(frozen=True, slots=True)
class StepObservation:
    """One forward pass: its chunks as (new, cached) tokens, its decodes, and how long it took."""

    prefills: tuple[tuple[int, int], ...]
    decode_contexts_tokens: int
    n_decodes: int
    seconds: float
    shared_tokens_saved: int = 0
    """As in `CostModel.iteration_s`."""


class Calibrator:
    """Keeps a cost model in line with what is observed."""

    def __init__(self, model: CostModel) -> None:
        self._model = model
        self._prefill = AffineFit(*model.prefill_correction, SCALE_LEAST)
        self._decode = AffineFit(*model.decode_correction, SCALE_LEAST)
        self._mixed: AffineFit | None = None
        self._n_since_mixed = 0
        self._edges: dict[tuple[Tier, Tier], tuple[AffineFit, float]] = {}

    @property
    def n_prefills(self) -> int:
        """Prefills learned from."""
        return self._prefill.n_observations

    def observe_step(
        self,
        prefills: Sequence[tuple[int, int]],
        decode_contexts_tokens: int,
        n_decodes: int,
        seconds: float,
        shared_tokens_saved: int = 0,
    ) -> None:
        """A forward pass took `seconds`. Passes of both kinds have a correction of their own, and
        say little about either kind."""
        model = self._model
        whole_s = model.roofline_s(prefills, decode_contexts_tokens, n_decodes, shared_tokens_saved)
        if not prefills:
            self._decode.observe(whole_s, seconds)
            model.correct(decode=Correction(self._decode.fixed_s, self._decode.scale))
            return
        alone_s = model.roofline_s(prefills, 0, 0)
        if n_decodes:
            self._observe_mixed(whole_s, alone_s, seconds)
            if alone_s < PURE_SHARE * whole_s:
                return
        else:
            self._n_since_mixed += 1
            if self._n_since_mixed >= MIXED_FORGOTTEN:
                self._mixed = None
                model.forget_mixing()
        self._prefill.observe(whole_s, seconds)
        model.correct(prefill=Correction(self._prefill.fixed_s, self._prefill.scale))

    def _observe_mixed(self, whole_s: float, alone_s: float, seconds: float) -> None:
        """Begins with what follows from the other two kinds."""
        model, self._n_since_mixed = self._model, 0
        if self._mixed is None:
            prefill, decode = model.prefill_correction, model.decode_correction
            share = alone_s / whole_s if whole_s else 1.0
            scale = share * prefill.scale + (1.0 - share) * decode.scale
            fixed_s = max(prefill.fixed_s, decode.fixed_s)
            self._mixed = AffineFit(fixed_s, scale, SCALE_LEAST)
        self._mixed.observe(whole_s, seconds)
        model.correct(mixed=Correction(self._mixed.fixed_s, self._mixed.scale))

    def observe_transfer(self, source: Tier, target: Tier, n_bytes: int, seconds: float) -> None:
        """One job of `n_bytes` took `seconds` of the edge, time in its queue not included.

        Raises ConfigError for an edge that the model does not know.
        """
        known = self._edges.get((source, target))
        if known is None:
            cost = self._model.edge(source, target)
            known = AffineFit(cost.latency_s), cost.bandwidth
            self._edges[source, target] = known
        fit, seed_bandwidth = known
        fit.observe(n_bytes / seed_bandwidth, seconds)
        self._model.correct_edge(
            source, target, bandwidth=seed_bandwidth / fit.scale, latency_s=fit.fixed_s
        )
