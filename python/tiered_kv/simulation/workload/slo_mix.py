"""Service classes, and a stated mix of them over a workload."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from tiered_kv.api.slo import DEFAULT_CLASSES, SloClass
from tiered_kv.simulation.workload.errors import WorkloadError
from tiered_kv.simulation.workload.request import Request

UnloadedPrefill = Callable[[int], float]
"""Seconds that a prompt of so many tokens takes to compute alone, nothing of it cached."""


@dataclass(frozen=True, slots=True)
class SloMix:
    """Classes and the share of sessions (or of requests without a session) that has each."""

    classes: tuple[SloClass, ...]
    shares: tuple[float, ...]
    multiples: tuple[float, ...] = ()
    """For each class, how many times its own unloaded prefill a request's first token may take
    beyond the class's TTFT; none: that alone counts, however long the prompt is."""

    @property
    def is_scaled(self) -> bool:
        """Whether objectives depend on the prompt."""
        return any(self.multiples)

    def slo_of(self, request: Request, seed: int, unloaded_s: UnloadedPrefill | None) -> SloClass:
        """What `request` is promised; unloaded_s: needed if the mix is scaled."""
        slo = self.assign(request, seed)
        if not self.is_scaled or slo.ttft_s is None:
            return slo
        assert unloaded_s is not None
        multiple = self.multiples[self.classes.index(slo)]
        return replace(slo, ttft_s=slo.ttft_s + multiple * unloaded_s(request.input_tokens))

    def assign(self, request: Request, seed: int) -> SloClass:
        """The class of `request`: the same for a whole session, and for the same seed."""
        # Two streams, so that session 5 and request 5 don't go together.
        own = request.session is None
        key = request.request_id if request.session is None else request.session
        drawn = np.random.default_rng([seed, int(own), key]).random()
        for slo, end in zip(self.classes, np.cumsum(self.shares), strict=True):
            if drawn < end:
                return slo
        return self.classes[-1]

    def priority(self, slo: SloClass) -> int:
        """For policies that know nothing else: how many classes may wait longer than `slo`."""
        return sum(_patience_s(other) > _patience_s(slo) for other in self.classes)


def _patience_s(slo: SloClass) -> float:
    return math.inf if slo.ttft_s is None else slo.ttft_s


def parse_slo_mix(text: str) -> SloMix:
    """A mix of a server's built-in classes, "interactive:0.3,standard:0.7", or of others.

    "chat:0.6:0.5:0.04,bulk:0.4:-:-" gives class `chat` 60% of the sessions, a TTFT target of 0.5 s
    and a TBT target of 40 ms, and class `bulk` no targets. "chat:0.6:0.5+3x:0.04" adds three times
    what the prompt takes to compute alone to the TTFT target, so that each can be met.
    "agent:1:-:-:300" gives whole sessions 300 s. The shares must sum to 1. Raises WorkloadError.
    """
    classes: list[SloClass] = []
    shares: list[float] = []
    multiples: list[float] = []
    for part in text.split(","):
        name, *rest = part.strip().split(":")
        known = DEFAULT_CLASSES.find(name)
        if len(rest) == 1 and known is None:
            raise WorkloadError(
                f"There is no service class {name!r}; write {name}:SHARE:TTFT_S:TBT_S, or use one "
                f"of {', '.join(DEFAULT_CLASSES.names())}."
            )
        if not name or len(rest) not in {1, 3, 4}:
            raise WorkloadError(
                f"{part!r} is no part of a mix; write CLASS:SHARE or CLASS:SHARE:TTFT_S:TBT_S, "
                "and :TASK_S after it for a target of whole sessions."
            )
        shares.append(_number(rest[0], part))
        if len(rest) == 1 and known is not None:
            classes.append(known)
            multiples.append(0.0)
        else:
            ttft_s, multiple = _scaled_target(rest[1], part)
            task_s = _target(rest[3], part) if len(rest) == 4 else None
            classes.append(SloClass(name, ttft_s, _target(rest[2], part), task_s=task_s))
            multiples.append(multiple)
    if not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
        raise WorkloadError(f"The shares of a mix must sum to 1; those of {text!r} don't.")
    return SloMix(tuple(classes), tuple(shares), tuple(multiples) if any(multiples) else ())


def _scaled_target(text: str, part: str) -> tuple[float | None, float]:
    """Of `0.5`, `0.5+3x` or `-`: seconds, and times the unloaded prefill."""
    base, plus, multiple = text.partition("+")
    if not plus:
        return _target(base, part), 0.0
    if not multiple.endswith("x"):
        raise WorkloadError(
            f"{text!r} in {part!r} is no TTFT; write seconds, and +Nx for N times the prompt's own "
            "prefill, such as 0.5+3x."
        )
    return _number(base, part), _number(multiple.removesuffix("x"), part)


def _target(text: str, part: str) -> float | None:
    return None if text == "-" else _number(text, part)


def _number(text: str, part: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < math.inf:
        raise WorkloadError(f"{text!r} in {part!r} is no number over 0; write one, such as 0.5.")
    return value
