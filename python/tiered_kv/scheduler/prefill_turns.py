"""What ran last, and how long: the state by which prefill and decodes take turns."""

from __future__ import annotations

import math

#: Share of the time that prefill takes at least while prompts wait: it gets at least half as long
#: as a decode whenever one has run.
TURN_SHARE = 1.0 / 3.0
#: Passes are remembered about so long.
LOAD_MEMORY_S = 2.0


class PrefillTurns:
    """Kept over the passes of one instance by whoever runs them; policies read it."""

    def __init__(self) -> None:
        self.decoded_last = True
        """Whether the last pass decoded: then it is the prefill's turn, a little of it even where
        no slack is left. False while nothing but prefill has run since the last decode."""
        self.decoded_s = 0.0
        """When the last pass that decoded ended."""
        self.in_a_row = 0
        """Passes that decoded, since the last that did not."""
        self._load = 0.0
        self._is_wanted = self._is_hurried = False

    def passed(self, now_s: float, seconds: float, *, decoded: bool, n: int = 1) -> None:
        """`n` passes of one kind ended, the last of them now; whether anyone decoded in them."""
        self.decoded_last = decoded
        self.in_a_row = self.in_a_row + n if decoded else 0
        if decoded:
            self.decoded_s = now_s
        keep = math.exp(-seconds / LOAD_MEMORY_S)
        self._load = keep * self._load + (0.0 if decoded else 1.0 - keep)

    # -- who waits ----------------------------------------------------------------------------

    @property
    def is_hurried(self) -> bool:
        """See `IterationState.is_hurried`."""
        return self._is_hurried

    def wants_prefill(self) -> None:
        """Prompts wait: until the next `decided` prefill has its turns."""
        self._is_wanted = True

    def planned(self, *, is_hurried: bool) -> None:
        """What the plan says that was asked with these prompts.

        It holds until the next one, or until nobody waits: while the batch is full no such plan is
        made, and who waits for room needs the throughput all the same.
        """
        self._is_hurried = is_hurried

    def nobody_waits(self) -> None:
        """The queue is empty, and no prompt was begun."""
        self._is_hurried = False

    def decided(self) -> None:
        """It was chosen who decodes."""
        self._is_wanted = False

    def load(self, *, is_mixed: bool = False) -> float:
        """See `IterationState.prefill_load`."""
        return max(self._load, TURN_SHARE) if self._is_wanted and not is_mixed else self._load
