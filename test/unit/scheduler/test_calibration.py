"""Calibration recovers parameters it was not told, through noise, stalls and changes."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiered_kv.core.device_spec import find_device
from tiered_kv.core.ids import Tier
from tiered_kv.core.model_spec import find_model
from tiered_kv.scheduler.calibration import (
    FIRST_STEP_MAX,
    MIXED_FORGOTTEN,
    N_FIRST,
    SCALE_LEAST,
    STEP_MAX,
    AffineFit,
    Calibrator,
)
from tiered_kv.scheduler.cost_model import CostModel, EdgeCost


def make_model() -> CostModel:
    return CostModel(
        find_model("Llama-3.1-8B"),
        find_device("H100-80"),
        {
            (Tier.HOST, Tier.DEVICE): EdgeCost(50e9, 1e-5),
            (Tier.DISK, Tier.HOST): EdgeCost(5e9, 1e-4),
        },
    )


def noisy(rng: random.Random, seconds: float, stalls: float = 0.0) -> float:
    seconds *= math.exp(rng.gauss(0, 0.05))
    return seconds * 30 if rng.random() < stalls else seconds


@pytest.mark.parametrize(("fixed_s", "scale"), [(0.004, 1.3), (0.0, 0.7), (0.02, 40.0)])
def test_it_recovers_fixed_part_and_scale_of_prefills(fixed_s: float, scale: float) -> None:
    rng = random.Random(1)
    model = make_model()
    calibrator = Calibrator(model)
    for _ in range(300):
        chunk = (rng.randrange(64, 8192), rng.randrange(0, 30_000))
        true_s = fixed_s + scale * model.roofline_s([chunk], 0, 0)
        calibrator.observe_step([chunk], 0, 0, noisy(rng, true_s, stalls=0.05))
    for chunk in (256, 0), (4096, 0), (2048, 16_000):
        true_s = fixed_s + scale * model.roofline_s([chunk], 0, 0)
        assert model.prefill_s(*chunk) == pytest.approx(true_s, rel=0.12)


def test_decode_steps_leave_prefills_alone_and_so_do_mixed_ones() -> None:
    model = make_model()
    calibrator = Calibrator(model)
    before = model.prefill_s(1000)
    for _ in range(100):
        calibrator.observe_step([], 64_000, 32, 3 * model.roofline_s([], 64_000, 32))
        calibrator.observe_step([(64, 0)], 64_000, 32, 5.0)
    assert model.prefill_s(1000) == before
    assert model.iteration_s([], 64_000, 32) == pytest.approx(
        3 * model.roofline_s([], 64_000, 32), rel=0.02
    )


@pytest.mark.parametrize("costs", [0.8, 2.5])
def test_it_learns_what_mixing_costs(costs: float) -> None:
    """However much longer a pass of both kinds takes than what follows from either."""
    rng = random.Random(3)
    model = make_model()
    calibrator = Calibrator(model)
    gain_s = model.mixing_gain_s([(2048, 0)], 64_000, 32)
    assert gain_s > 0
    for _ in range(100):
        chunk, context = (rng.randrange(256, 4096), 0), rng.randrange(8_000, 100_000)
        true_s = costs * (0.002 + model.roofline_s([chunk], context, 32))
        calibrator.observe_step([chunk], context, 32, noisy(rng, true_s))
        calibrator.observe_step([chunk], 0, 0, 0.002 + model.roofline_s([chunk], 0, 0))
    found = model.iteration_s([(2048, 0)], 64_000, 32)
    assert found == pytest.approx(
        costs * (0.002 + model.roofline_s([(2048, 0)], 64_000, 32)), rel=0.1
    )
    assert (model.mixing_gain_s([(2048, 0)], 64_000, 32) > 0) is (costs < 1)


def test_what_speaks_against_mixing_is_forgotten_in_the_end() -> None:
    model = make_model()
    calibrator = Calibrator(model)
    chunk = (1024, 0)
    for _ in range(20):
        calibrator.observe_step([chunk], 64_000, 32, 1.0)
    assert model.mixing_gain_s([chunk], 64_000, 32) < 0
    for n in range(MIXED_FORGOTTEN):
        assert (model.mixed_correction is None) is False, n
        calibrator.observe_step([chunk], 0, 0, model.roofline_s([chunk], 0, 0))
        calibrator.observe_step([], 64_000, 32, model.roofline_s([], 64_000, 32))
    assert model.mixed_correction is None
    assert model.mixing_gain_s([chunk], 64_000, 32) > 0


def test_it_recovers_an_edge() -> None:
    rng = random.Random(2)
    model = make_model()
    calibrator = Calibrator(model)
    for _ in range(300):
        n_bytes = rng.randrange(10**5, 10**9)
        calibrator.observe_transfer(
            Tier.DISK, Tier.HOST, n_bytes, noisy(rng, 2e-3 + n_bytes / 1.2e9, stalls=0.03)
        )
    assert model.edge(Tier.DISK, Tier.HOST).bandwidth == pytest.approx(1.2e9, rel=0.1)
    assert model.edge(Tier.DISK, Tier.HOST).latency_s == pytest.approx(2e-3, rel=0.25)
    assert model.edge(Tier.HOST, Tier.DEVICE) == EdgeCost(50e9, 1e-5)


def test_steps_of_one_size_are_predicted_though_they_cannot_be_told_apart() -> None:
    fit = AffineFit(0.001)
    for _ in range(100):
        fit.observe(0.01, 0.05)
    assert fit.predict(0.01) == pytest.approx(0.05, rel=0.01)


def test_one_stall_hardly_moves_a_settled_fit() -> None:
    rng = random.Random(3)
    fit = AffineFit(0.001)
    for _ in range(100):
        x = rng.uniform(0.01, 0.2)
        fit.observe(x, noisy(rng, 0.002 + 1.5 * x))
    before = fit.predict(0.1)
    fit.observe(0.1, 60.0)
    assert fit.predict(0.1) == pytest.approx(before, rel=0.02)


def test_it_follows_a_lasting_change() -> None:
    rng = random.Random(4)
    fit = AffineFit(0.001)
    for scale in (1.0, 4.0):
        for _ in range(200):
            x = rng.uniform(0.01, 0.2)
            fit.observe(x, noisy(rng, 0.002 + scale * x))
        assert fit.predict(0.1) == pytest.approx(0.002 + scale * 0.1, rel=0.1)


@given(
    st.lists(
        st.tuples(
            st.floats(allow_nan=True, allow_infinity=True), st.floats(allow_nan=True, width=32)
        ),
        max_size=60,
    )
)
def test_whatever_is_observed_parameters_stay_finite_positive_and_move_in_bounded_steps(
    observations: list[tuple[float, float]],
) -> None:
    fit = AffineFit(0.001)
    for predicted_s, observed_s in observations:
        scale, longest = fit.scale, FIRST_STEP_MAX
        if fit.n_observations >= N_FIRST:
            longest = STEP_MAX
        fit.observe(predicted_s, observed_s)
        assert math.isfinite(fit.fixed_s)
        assert fit.fixed_s >= 0
        assert scale / (longest * 1.001) <= fit.scale <= scale * longest * 1.001


def test_equal_observations_give_equal_parameters() -> None:
    fits = AffineFit(0.001), AffineFit(0.001)
    rng = random.Random(5)
    for _ in range(50):
        x = rng.random()
        y = noisy(rng, x, stalls=0.1)
        for fit in fits:
            fit.observe(x, y)
    assert (fits[0].fixed_s, fits[0].scale) == (fits[1].fixed_s, fits[1].scale)


def test_steps_that_are_all_alike_change_the_scale_not_the_fixed_part() -> None:
    fit = AffineFit(0.0)
    for _ in range(100):
        fit.observe(0.2, 1.2)
    assert fit.predict(0.2) == pytest.approx(1.2, rel=0.01)
    # Half as much work, which was never seen, takes little more than half as long.
    assert fit.predict(0.1) < 0.56 * 1.2
    # Until it was seen to take longer.
    for at in range(300):
        fit.observe(*((0.2, 1.2), (0.1, 1.0))[at % 2])
    assert fit.predict(0.1) == pytest.approx(1.0, rel=0.05)
    assert fit.predict(0.2) == pytest.approx(1.2, rel=0.05)


def test_passes_whose_size_explains_nothing_do_not_make_work_free() -> None:
    model, rng = make_model(), random.Random(7)
    calibrator = Calibrator(model)
    for _ in range(2000):
        # A fraction of the time is work, and the rest scatters more than that.
        calibrator.observe_step([(rng.randrange(1, 4096), 0)], 0, 0, noisy(rng, 50.0))
        calibrator.observe_step([], rng.randrange(1, 10**6), 16, noisy(rng, 50.0))
    assert model.prefill_correction.scale >= SCALE_LEAST
    assert model.decode_correction.scale >= SCALE_LEAST
    assert model.iteration_s([(2048, 0)], 0, 0) == pytest.approx(50.0, rel=0.15)
    assert model.iteration_s((), 500_000, 16) == pytest.approx(50.0, rel=0.15)


def test_a_link_may_be_faster_than_believed_by_any_factor() -> None:
    fit = AffineFit(10.0)
    for _ in range(200):
        fit.observe(10.0, 1e-5)
    assert fit.predict(10.0) == pytest.approx(1e-5, rel=0.1)
