"""Whether what the host has of a prompt is loaded to the device now.

How much is for the costs to say (`MemoryManager.on_match`). Now and then a few pages are loaded
whatever they are believed to cost; and after loads that failed none is tried for a while.
"""

from __future__ import annotations

from typing import Protocol

from tiered_kv.forest.results import Match
from tiered_kv.memory.actions import Load
from tiered_kv.memory.back_off import BackOff
from tiered_kv.memory.probes import PROBE_PAGES, Probes


class LoadRules(Protocol):
    """The memory manager's."""

    def on_match(
        self,
        match: Match,
        *,
        prompt_tokens: int | None = None,
        queued_bytes: int = 0,
        least_pages: int = 0,
    ) -> Load | None: ...


class Loads:
    """pages_per_unit: of the server's, in what is one page here."""

    def __init__(self, pages_per_unit: float = 1.0) -> None:
        self._probe_pages = max(1, int(PROBE_PAGES / pages_per_unit))
        self._probes = Probes()
        self._back_off = BackOff()

    @property
    def are_working(self) -> bool:
        """Whether the last one did not fail. If it did, none is loaded that nobody waits for."""
        return self._back_off.is_well

    def is_waiting(self, now_s: float) -> bool:
        """Whether none is tried, for some have failed."""
        return not self._back_off.is_over(now_s)

    def wanted(
        self,
        rules: LoadRules,
        match: Match,
        now_s: float,
        *,
        prompt_tokens: int | None,
        queued_bytes: int,
    ) -> Load | None:
        """What to load of `match` now, as `MemoryManager.on_match`; None: nothing."""
        if self.is_waiting(now_s):
            return None
        return rules.on_match(
            match,
            prompt_tokens=prompt_tokens,
            queued_bytes=queued_bytes,
            least_pages=self._probe_pages if self._probes.is_due(now_s) else 0,
        )

    def begun(self, now_s: float) -> None:
        """There was room for a load, and it is on its way."""
        self._probes.begun(now_s)

    def worked(self) -> None:
        self._back_off.worked()

    def failed(self, now_s: float) -> None:
        self._back_off.failed(now_s)
