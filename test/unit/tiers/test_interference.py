"""The controller keeps what write-back costs decoding within its budget, whatever a byte costs.

`Decoding` plays steps against it: it moves what the rate in force allows, in portions, unless the
step is to be left alone, and steps take longer by a harm that only it knows.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiered_kv.tiers.interference import (
    PROBE_STEPS,
    QUIET_STEPS_MIN,
    RATE_MIN,
    STEPS_PER_PROBE,
    InterferenceBudget,
)

pytestmark = pytest.mark.timeout(60)

PORTION = 1 << 20
LINK = 50e9

#: (bytes moved, seconds that the step takes by itself) -> seconds that it takes longer
Harm = Callable[[int, float], float]


class Decoding:
    def __init__(
        self,
        budget: float,
        harm: Harm,
        *,
        step_s: float = 0.02,
        noise: float = 0.0,
        seed: int = 0,
        unit: float = 1.0,
    ) -> None:
        self.budget = InterferenceBudget(budget)
        self.harm = harm
        self.step_s = step_s
        self.noise = noise
        self.unit = unit
        self.rng = random.Random(seed)
        self.own_s = self.added_s = 0.0
        self.n_bytes = 0
        self._allowance = 0.0
        self._was_quiet = False
        self._seconds = step_s

    def run(self, n_steps: int) -> None:
        """Steps with an endless backlog; the sums begin anew."""
        self.own_s = self.added_s = 0.0
        self.n_bytes = 0
        for _ in range(n_steps):
            self.step()

    def step(self) -> None:
        # Batches differ by a factor of two, which is foreseen up to a constant.
        own_s = self.step_s * (1 + self.rng.random())
        expected_s = own_s * self.unit
        own_s *= math.exp(self.rng.gauss(0, self.noise)) if self.noise else 1.0
        moved = 0
        if not self.budget.wants_quiet:
            most = int(LINK * self.step_s) // PORTION
            self._allowance = min(
                self._allowance + self.budget.bytes_per_s * self._seconds / PORTION, most
            )
            moved = int(self._allowance) * PORTION
            self._allowance -= moved // PORTION
        added_s = self.harm(moved, own_s) if moved else 0.0
        self._seconds = own_s + added_s
        if moved:
            self.budget.observe_busy(self._seconds, expected_s, moved)
        elif self._was_quiet:
            self.budget.observe_quiet(self._seconds, expected_s)
        else:
            self.budget.pass_by()
        self._was_quiet = moved == 0
        self.own_s += own_s
        self.added_s += added_s
        self.n_bytes += moved

    @property
    def slowdown(self) -> float:
        return self.added_s / self.own_s

    @property
    def rate(self) -> float:
        return self.n_bytes / (self.own_s + self.added_s)


@settings(max_examples=25, deadline=None)
@given(
    budget=st.sampled_from([0.01, 0.03, 0.1]),
    full_slowdown=st.floats(0.02, 3.0),
    step_s=st.sampled_from([0.005, 0.02, 0.1]),
    power=st.sampled_from([1.0, 0.6, 1.4]),
    unit=st.sampled_from([1.0, 0.01, 300.0]),
    seed=st.integers(0, 1000),
)
def test_decoding_slows_down_by_the_budget_and_no_more(
    budget: float, full_slowdown: float, step_s: float, power: float, unit: float, seed: int
) -> None:
    """full_slowdown: what the whole link's bandwidth would cost, reached by a power law."""

    def harm(moved: int, own_s: float) -> float:
        return float(full_slowdown * own_s * (moved / (LINK * own_s)) ** power)

    decoding = Decoding(budget, harm, step_s=step_s, unit=unit, seed=seed)
    decoding.run(600)
    decoding.run(2000)
    is_at_floor = decoding.budget.bytes_per_s <= 2 * RATE_MIN
    assert decoding.slowdown <= budget * 1.25 or is_at_floor
    # Nor does it hold back what could go: it comes near the budget, or near the link.
    assert decoding.slowdown >= budget * 0.5 or decoding.rate >= 0.4 * LINK or power < 1


@pytest.mark.parametrize("noise", [0.05, 0.2])
def test_noise_neither_breaks_the_budget_nor_stops_the_copies(noise: float) -> None:
    def harm(moved: int, own_s: float) -> float:
        return moved / 20e9

    decoding = Decoding(0.03, harm, noise=noise, seed=3)
    decoding.run(600)
    decoding.run(20_000)
    assert decoding.slowdown <= 0.03 * (2 if noise < 0.1 else 6)
    assert decoding.rate >= 0.3 * 0.03 * 20e9


def test_what_does_no_harm_is_not_held_back() -> None:
    decoding = Decoding(0.03, lambda moved, own_s: 0.0)
    decoding.run(600)
    assert math.isinf(decoding.budget.bytes_per_s)
    decoding.run(1000)
    assert decoding.rate >= 0.4 * LINK


def test_harm_that_begins_later_is_noticed_and_forgotten_again() -> None:
    seconds_per_byte = 0.0
    decoding = Decoding(0.03, lambda moved, own_s: moved * seconds_per_byte)
    decoding.run(600)
    free = decoding.rate
    seconds_per_byte = 1 / 10e9
    decoding.run(600)
    decoding.run(1000)
    assert decoding.slowdown <= 0.03 * 1.25
    seconds_per_byte = 0.0
    decoding.run(1500)
    decoding.run(500)
    assert decoding.rate >= 0.9 * free


def test_ruinous_copies_still_make_progress() -> None:
    decoding = Decoding(0.01, lambda moved, own_s: own_s)
    decoding.run(5000)
    assert decoding.budget.bytes_per_s >= RATE_MIN
    assert decoding.n_bytes > 0


def test_one_stall_does_not_change_the_rate_much() -> None:
    decoding = Decoding(0.03, lambda moved, own_s: moved / 20e9)
    decoding.run(1000)
    before = decoding.budget.bytes_per_s
    decoding.budget.observe_quiet(5.0, 0.02)
    decoding.run(200)
    assert decoding.budget.bytes_per_s == pytest.approx(before, rel=0.4)


def test_it_compares_before_it_judges_and_from_time_to_time() -> None:
    budget = InterferenceBudget(0.03)
    initial = budget.bytes_per_s
    for _ in range(QUIET_STEPS_MIN):
        assert budget.wants_quiet
        budget.observe_busy(9.0, 1.0, 1 << 30)
        assert budget.bytes_per_s == initial, "there was nothing to compare with"
        budget.observe_quiet(1.0, 1.0)
    quiet = []
    for _ in range(10 * (STEPS_PER_PROBE + PROBE_STEPS)):
        quiet.append(budget.wants_quiet)
        if quiet[-1]:
            budget.observe_quiet(1.0, 1.0)
        else:
            budget.observe_busy(1.0, 1.0, 1 << 20)
    assert sum(quiet) == pytest.approx(10 * PROBE_STEPS, abs=PROBE_STEPS)


@pytest.mark.parametrize("budget", [0.0, -0.03, math.nan, math.inf])
def test_a_budget_is_a_positive_share(budget: float) -> None:
    with pytest.raises(ValueError, match="positive share"):
        InterferenceBudget(budget)
