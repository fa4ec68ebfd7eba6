"""Latency objectives: what a request was promised, and the classes that give it one by name."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Slo:
    """The latency a request was promised; None where nothing was."""

    slo_class: str = "standard"
    ttft_s: float | None = None
    """Seconds from arrival to the first token."""
    tbt_s: float | None = None
    """Seconds between two tokens."""
    max_wait_s: float | None = None
    """Seconds after which it is admitted before whatever arrived later; None: the policy's own."""
    task_s: float | None = None
    """Seconds from the first call of its session to the end of the last."""


NO_SLO = Slo()


def objectives_met(
    ttft_s: float | None,
    tbt_s: float | None,
    *,
    ttft_objective_s: float | None,
    tbt_objective_s: float | None,
) -> bool:
    """Whether an answer was in time: the one criterion of server, simulator and replay.

    ttft_s: None if there was no first token; tbt_s: None if no other came after it.
    An objective of None is always met.
    """
    if ttft_objective_s is not None and (ttft_s is None or ttft_s > ttft_objective_s):
        return False
    return tbt_objective_s is None or tbt_s is None or tbt_s <= tbt_objective_s


@dataclass(frozen=True, slots=True)
class SloClass:
    """A named objective: every request of the class has it, save for what it overrides."""

    name: str
    ttft_s: float | None = None
    """Seconds from arrival to the first token; None: no objective."""
    tbt_s: float | None = None
    """Seconds between two tokens; None: no objective."""
    max_wait_s: float | None = None
    """See `Slo.max_wait_s`."""
    task_s: float | None = None
    """See `Slo.task_s`."""

    def slo(self) -> Slo:
        """The objective of a request that names this class and nothing else."""
        return Slo(self.name, self.ttft_s, self.tbt_s, self.max_wait_s, self.task_s)


INTERACTIVE = SloClass("interactive", ttft_s=0.5, tbt_s=0.05)
STANDARD = SloClass("standard", ttft_s=2.0, tbt_s=0.1)
BATCH = SloClass("batch", ttft_s=30.0)


@dataclass(frozen=True, slots=True)
class SloClasses:
    """The classes that a server knows, and which of them a request has that names none."""

    classes: tuple[SloClass, ...] = (INTERACTIVE, STANDARD, BATCH)
    """Names are unique."""
    default: str | None = STANDARD.name
    """A name out of `classes`; None: a request that asks for nothing was promised nothing."""

    def names(self) -> tuple[str, ...]:
        return tuple(c.name for c in self.classes)

    def find(self, name: str) -> SloClass | None:
        """The class of that name, or None if there is none."""
        return next((c for c in self.classes if c.name == name), None)

    def least_urgent(self) -> str | None:
        """The class with the latest first token: work that nobody waits for has it.

        None if the table is empty.
        """
        latest = max(self.classes, key=_ttft_s, default=None)
        return None if latest is None else latest.name

    def default_slo(self) -> Slo:
        """The objective of a request that asks for nothing."""
        found = None if self.default is None else self.find(self.default)
        return NO_SLO if found is None else found.slo()


def _ttft_s(slo_class: SloClass) -> float:
    return math.inf if slo_class.ttft_s is None else slo_class.ttft_s


DEFAULT_CLASSES = SloClasses()
