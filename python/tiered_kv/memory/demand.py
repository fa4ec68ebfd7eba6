"""What is expected to be needed, and when: filled by whoever knows, read by placement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Expectation:
    """One prefix's next use."""

    starts_in_s: float
    """Seconds until it is expected to be needed; 0 or less: now."""
    probability: float = 1.0
    """That it will be needed at all, between 0 and 1."""


_NOTHING: Mapping[int, Expectation] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class DemandForecast:
    """Expected uses by node id; a node's ancestors are needed with it.

    Must be the same on all tensor-parallel ranks.
    """

    next_use: Mapping[int, Expectation] = field(default_factory=lambda: _NOTHING)
