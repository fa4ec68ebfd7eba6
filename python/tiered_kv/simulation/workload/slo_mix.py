"""Service classes, and a stated mix of them over a workload."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tiered_kv.api.slo import DEFAULT_CLASSES, SloClass
from tiered_kv.simulation.workload.errors import WorkloadError
from tiered_kv.simulation.workload.request import Request


@dataclass(frozen=True, slots=True)
class SloMix:
    """Classes and the share of sessions (or of requests without a session) that has each."""

    classes: tuple[SloClass, ...]
    shares: tuple[float, ...]

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
    and a TBT target of 40 ms, and class `bulk` no targets. The shares must sum to 1. Raises
    WorkloadError.
    """
    classes: list[SloClass] = []
    shares: list[float] = []
    for part in text.split(","):
        name, *rest = part.strip().split(":")
        known = DEFAULT_CLASSES.find(name)
        if len(rest) == 1 and known is None:
            raise WorkloadError(
                f"There is no service class {name!r}; write {name}:SHARE:TTFT_S:TBT_S, or use one "
                f"of {', '.join(DEFAULT_CLASSES.names())}."
            )
        if not name or len(rest) not in {1, 3}:
            raise WorkloadError(
                f"{part!r} is no part of a mix; write CLASS:SHARE or CLASS:SHARE:TTFT_S:TBT_S."
            )
        shares.append(_number(rest[0], part))
        if len(rest) == 1 and known is not None:
            classes.append(known)
        else:
            classes.append(SloClass(name, _target(rest[1], part), _target(rest[2], part)))
    if not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
        raise WorkloadError(f"The shares of a mix must sum to 1; those of {text!r} don't.")
    return SloMix(tuple(classes), tuple(shares))


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
