"""Whose turn it is where prefills run between decodes, and what share of the time prefill takes."""

from __future__ import annotations

import math

#: Share of the time that prefill takes at least while prompts wait: it gets at least half as long
#: as a decode whenever one has run.
TURN_SHARE = 1.0 / 3.0
#: Passes are remembered about so long.
LOAD_MEMORY_S = 2.0


class PrefillTurns:
    """What `IterationState` says of prefill, kept over the passes of one instance."""

    def __init__(self) -> None:
        self.decoded_last = True
        """Whether the last pass decoded."""
        self._load = 0.0
        self._is_wanted = self._is_hurried = False

    def passed(self, seconds: float, *, decoded: bool) -> None:
        """A pass ended, or some of the same kind; whether anyone decoded."""
        self.decoded_last = decoded
        keep = math.exp(-seconds / LOAD_MEMORY_S)
        self._load = keep * self._load + (0.0 if decoded else 1.0 - keep)

    @property
    def is_hurried(self) -> bool:
        """See `IterationState.is_hurried`."""
        return self._is_wanted and self._is_hurried

    def wants_prefill(self) -> None:
        """Prompts wait: until the next `decided` prefill has its turns."""
        self._is_wanted = True

    def planned(self, *, is_hurried: bool) -> None:
        """What the plan says that was asked with these prompts."""
        self._is_hurried = is_hurried

    def decided(self) -> None:
        """It was chosen who decodes."""
        self._is_wanted = False

    def load(self, *, is_mixed: bool = False) -> float:
        """See `IterationState.prefill_load`."""
        return max(self._load, TURN_SHARE) if self._is_wanted and not is_mixed else self._load
