"""All that a request brought along for the scheduler and the cache, in one value."""

from __future__ import annotations

from dataclasses import dataclass

from tiered_kv.api.hints import NO_HINTS, Hints
from tiered_kv.api.slo import NO_SLO, Slo


@dataclass(frozen=True, slots=True)
class Terms:
    """The terms on which one request is served."""

    slo: Slo = NO_SLO
    hints: Hints = NO_HINTS
    tenant: str = ""
    """For whom it is: requests of one tenant share its part of the server; "": the nameless one."""
    report: bool = False
    """Whether the response tells what became of the request (`api/report.py`)."""
