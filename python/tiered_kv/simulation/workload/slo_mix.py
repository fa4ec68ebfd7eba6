"""Service classes, and a stated mix of them over a workload."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tiered_kv.simulation.workload.errors import WorkloadError
from tiered_kv.simulation.workload.request import Request


@dataclass(frozen=True, slots=True)
class SloClass:
    """A class of service and its targets in seconds; None for no target."""

    name: str
    ttft_s: float | None
    tbt_s: float | None
    priority: int = 0


CLASSES = {
    slo.name: slo
    for slo in (
        SloClass("interactive", ttft_s=1.0, tbt_s=0.05, priority=2),
        SloClass("standard", ttft_s=5.0, tbt_s=0.1, priority=1),
        SloClass("batch", ttft_s=60.0, tbt_s=None, priority=0),
    )
}
"""The classes that have a name of their own; their targets are this project's choice."""


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


def parse_slo_mix(text: str) -> SloMix:
    """A mix written as "interactive:0.3,standard:0.7", or with targets of one's own.

    "chat:0.6:0.5:0.04,bulk:0.4:-:-" gives class `chat` 60% of the sessions, a TTFT target of 0.5 s
    and a TBT target of 40 ms, and class `bulk` no targets. The shares must sum to 1. Raises
    WorkloadError.
    """
    classes: list[SloClass] = []
    shares: list[float] = []
    for part in text.split(","):
        name, *rest = part.strip().split(":")
        if len(rest) == 1 and name not in CLASSES:
            raise WorkloadError(
                f"There is no service class {name!r}; write {name}:SHARE:TTFT_S:TBT_S, or use one "
                f"of {', '.join(CLASSES)}."
            )
        if not name or len(rest) not in {1, 3}:
            raise WorkloadError(
                f"{part!r} is no part of a mix; write CLASS:SHARE or CLASS:SHARE:TTFT_S:TBT_S."
            )
        shares.append(_number(rest[0], part))
        if len(rest) == 1:
            classes.append(CLASSES[name])
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
