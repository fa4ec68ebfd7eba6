"""How fast write-back may go while requests decode: as fast as costs them at most a given share.

The controller learns what a byte that is moved in the background adds to decode steps, and allows
as many bytes a second as add up to the budget. It has no clock and starts nothing: `tiers.pacing`
asks it.
"""

from __future__ import annotations

import math

#: What a byte is taken to cost before any was measured: as if a step stood still while memory of
#: this many bytes a second was copied.
BANDWIDTH_PRIOR = 10e9
#: Bytes after which what was measured counts as much as the above.
PRIOR_BYTES = 64e6
#: Disturbed steps whose memory fades to 1/e.
BUSY_STEPS = 64.0
#: Undisturbed steps likewise, and how many must have been seen to compare with.
QUIET_STEPS = 16.0
QUIET_STEPS_MIN = 2
#: No more than this factor from what is usual is believed of one undisturbed step.
QUIET_CLIP = 1.25
#: Of so many disturbed steps, the next few are to be left alone, to see what they take.
STEPS_PER_PROBE = 13
PROBE_STEPS = 3
#: Never slower than this, in bytes a second: what waits must go some time.
RATE_MIN = 32e6
#: At more than this there is nothing to limit.
RATE_MAX = 1e11


class InterferenceBudget:
    """Bytes a second that may be moved while requests decode, so that steps take (1 + budget).

    With e the seconds that a byte adds, a rate r makes decoding r * e slower: r = budget / e. The
    estimate of e is a quotient of sums over recent steps, taken at the rate in force: where harm is
    not proportional to bytes, rate and estimate move until they agree. A step's time is judged
    against `expected_s`, whatever predicts how steps differ from one another; only ratios count.
    """

    def __init__(self, budget: float) -> None:
        """budget: a positive share, 0.03 for steps that take 3% longer."""
        if not (math.isfinite(budget) and budget > 0):
            raise ValueError(f"an interference budget must be a positive share, not {budget}")
        self.budget = budget
        self._ratio = 0.0
        self._n_quiet = 0
        self._added_s = PRIOR_BYTES / BANDWIDTH_PRIOR
        self._n_bytes = PRIOR_BYTES
        self._n_busy_since_probe = 0
        self._probe_left = 0

    @property
    def bytes_per_s(self) -> float:
        """The rate in force; infinite if none that can be reached does harm."""
        seconds_per_byte = max(0.0, self._added_s) / self._n_bytes
        if seconds_per_byte * RATE_MAX <= self.budget:
            return math.inf
        return max(RATE_MIN, self.budget / seconds_per_byte)

    @property
    def wants_quiet(self) -> bool:
        """Whether the next step should be left alone, for comparison."""
        return self._n_quiet < QUIET_STEPS_MIN or self._probe_left > 0

    def observe_quiet(self, seconds: float, expected_s: float) -> None:
        """A decode step took `seconds` while nothing was moved, nor shortly before."""
        ratio = seconds / expected_s
        if self._n_quiet >= QUIET_STEPS_MIN:
            # A step that was held up by something else altogether must not be the measure.
            ratio = min(max(ratio, self._ratio / QUIET_CLIP), self._ratio * QUIET_CLIP)
        self._n_quiet += 1
        self._ratio += (ratio - self._ratio) / min(self._n_quiet, QUIET_STEPS)
        self.pass_by()

    def observe_busy(self, seconds: float, expected_s: float, n_bytes: int) -> None:
        """A decode step took `seconds` while `n_bytes` were moved."""
        self._n_busy_since_probe += 1
        if self._n_busy_since_probe >= STEPS_PER_PROBE:
            self._n_busy_since_probe, self._probe_left = 0, PROBE_STEPS
        else:
            self.pass_by()
        if self._n_quiet < QUIET_STEPS_MIN:
            return
        usual_s = self._ratio * expected_s
        added_s = min(max(seconds - usual_s, -usual_s), usual_s)
        keep = 1 - 1 / BUSY_STEPS
        self._added_s = keep * self._added_s + added_s
        self._n_bytes = keep * self._n_bytes + n_bytes

    def pass_by(self) -> None:
        """A step went by that teaches nothing more, such as the first after a copy."""
        self._probe_left = max(0, self._probe_left - 1)
