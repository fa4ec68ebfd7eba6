"""Measured passes in place of the roofline."""

from __future__ import annotations

import pytest

from tiered_kv.core.device_spec import find_device
from tiered_kv.core.errors import ConfigError
from tiered_kv.core.model_spec import find_model
from tiered_kv.scheduler.calibration import Calibrator
from tiered_kv.scheduler.measured_costs import MeasuredCosts, PassTimes

TIMES = PassTimes(
    prefill_fixed_s=0.1,
    prefill_request_s=0.01,
    prefill_token_s=0.003,
    prefill_pair_s=1e-6,
    prefill_cached_s=2e-5,
    decode_fixed_s=0.05,
    decode_request_s=0.004,
    decode_context_s=1e-5,
)


def costs() -> MeasuredCosts:
    return MeasuredCosts(find_model("SmolLM2-135M"), find_device("CPU-2"), {}, TIMES)


def test_a_prefill_is_the_sum_of_its_parts() -> None:
    expected = 0.1 + 0.01 + 0.003 * 100 + 1e-6 * 100 * (500 + 50.5) + 2e-5 * 500
    assert costs().prefill_s(100, 500) == pytest.approx(expected)
    assert costs().iteration_s([(100, 500)], 0, 0) == pytest.approx(expected)
    assert costs().marginal_prefill_s(100, 500) == pytest.approx(expected - 0.1 - 0.01)
    assert costs().prefill_s(0, 500) == costs().marginal_prefill_s(0, 500) == 0.0


def test_requests_of_one_pass_share_its_fixed_part() -> None:
    alone = costs().prefill_s(64) - 0.1
    assert costs().iteration_s([(64, 0)] * 3, 0, 0) == pytest.approx(0.1 + 3 * alone)


def test_a_decode_pass_reads_what_is_shared_once() -> None:
    assert costs().iteration_s((), 4000, 4) == pytest.approx(0.05 + 0.016 + 0.04)
    assert costs().iteration_s((), 4000, 4, 3000) == pytest.approx(0.05 + 0.016 + 0.01)


def test_a_mixed_pass_takes_both_and_the_larger_fixed_part() -> None:
    mixed = costs().iteration_s([(64, 0)], 1000, 2)
    prefill, decode = costs().prefill_s(64) - 0.1, 2 * 0.004 + 0.01
    assert mixed == pytest.approx(0.1 + prefill + decode)
    assert costs().iteration_s((), 0, 0) == 0.0


def test_calibration_goes_on_from_what_was_measured() -> None:
    model = costs()
    calibrator = Calibrator(model)
    before = model.prefill_s(256)
    for new in (64, 128, 256, 512) * 20:
        calibrator.observe_step([(new, 0)], 0, 0, 2 * costs().prefill_s(new))
    assert model.prefill_s(256) == pytest.approx(2 * before, rel=0.03)


def test_times_below_zero_are_refused() -> None:
    fields = dict.fromkeys(PassTimes.__slots__, 0.0)
    with pytest.raises(ConfigError, match="decode_context_s"):
        PassTimes(**{**fields, "decode_context_s": -1.0})
