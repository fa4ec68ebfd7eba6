"""Is memory plentiful? What the kernel says of it, sampled seldom, answered with hysteresis."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tiered_kv.tiers.memory_limits import memory_limits, own_group_v2

SAMPLE_S = 0.5
"""Shortest time between two looks at the kernel's files."""
CALM_S = 10.0
"""How long memory must have been plentiful before it counts as such again."""

SCARCE_STALL_SHARE = 0.02
PLENTIFUL_STALL_SHARE = 0.002
SCARCE_AVAILABLE_SHARE = 0.10
PLENTIFUL_AVAILABLE_SHARE = 0.20


@dataclass(frozen=True, slots=True)
class MemorySample:
    """One look at the machine (or at the control group that this process is confined to)."""

    available_share: float
    """Memory that can be had without swapping, page cache included, as a share of all."""
    stalled_us: int | None
    """Microseconds, since some start, in which some task waited for memory (PSI `some total`);
    None where the kernel does not say."""


class MemoryProbe(Protocol):
    """Where samples come from; None if nothing can be learnt."""

    def __call__(self) -> MemorySample | None: ...


class KernelMemory:
    """Reads what the kernel says of the machine, and of the control groups that this process is in.

    `root` has /proc and /sys.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root

    def __call__(self) -> MemorySample | None:
        limits = memory_limits(self._root)
        if not limits:
            return None
        return MemorySample(min(limit.available_share for limit in limits), self._stalled_us())

    def _stalled_us(self) -> int | None:
        # A root control group has no file of its own: there the machine's is the one.
        group = own_group_v2(self._root) / "memory.pressure"
        for path in (group, self._root / "proc/pressure/memory"):
            try:
                return _parse_stall(path.read_text())
            except (OSError, ValueError, KeyError):
                continue
        return None


def _parse_stall(text: str) -> int:
    for line in text.splitlines():
        kind, *fields = line.split()
        if kind == "some":
            return int(dict(field.split("=") for field in fields)["total"])
    raise ValueError("no line begins with `some`")


class MemoryPressure:
    """`is_plentiful()` turns False at once under pressure, and True again only after 10 calm s.

    Pressure: tasks stalled on memory for more than 2% of the time since the last sample (PSI), or
    less than 10% of memory available. Calm: at most 0.2% stalled and at least 20% available. In
    between the answer stays what it was. Without PSI only the available memory counts; if that
    cannot be read either, memory is never plentiful.
    """

    def __init__(
        self, probe: MemoryProbe | None = None, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._probe = probe or KernelMemory()
        self._now = now
        self._lock = threading.Lock()
        self._sampled_at = float("-inf")
        self._stalled_us: int | None = None
        self._calm_since: float | None = None
        self._is_plentiful = False
        self._is_first = True

    def is_plentiful(self) -> bool:
        """Costs a few small reads at most every half second, else nothing."""
        now = self._now()
        if now - self._sampled_at >= SAMPLE_S and self._lock.acquire(blocking=False):
            try:
                self._take_sample(now)
            finally:
                self._lock.release()
        return self._is_plentiful

    def was_plentiful(self) -> bool:
        """The last answer, however old; the first time it is found out."""
        return self.is_plentiful() if self._is_first else self._is_plentiful

    def _take_sample(self, now: float) -> None:
        sample = self._probe()
        stall_share = self._stall_share(sample, now - self._sampled_at)
        self._sampled_at = now
        if (
            sample is None
            or sample.available_share < SCARCE_AVAILABLE_SHARE
            or stall_share > SCARCE_STALL_SHARE
        ):
            self._is_plentiful, self._calm_since = False, None
        elif (
            sample.available_share < PLENTIFUL_AVAILABLE_SHARE
            or stall_share > PLENTIFUL_STALL_SHARE
        ):
            self._calm_since = None
        else:
            if self._calm_since is None:
                self._calm_since = now
            # At the start nothing is known to have been wrong: no need to wait.
            if self._is_first or now - self._calm_since >= CALM_S:
                self._is_plentiful = True
        self._is_first = False

    def _stall_share(self, sample: MemorySample | None, elapsed_s: float) -> float:
        before = self._stalled_us
        self._stalled_us = None if sample is None else sample.stalled_us
        if before is None or self._stalled_us is None:
            return 0.0
        return (self._stalled_us - before) / (elapsed_s * 1e6)
