"""Fitting measured passes, and comparing a replay with a simulation; without a server."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmark.simulation.agreement import (  # noqa: E402
    LOAD,
    interval_for,
    simulate,
    simulated,
    waves,
)
from benchmark.simulation.agreement_report import (  # noqa: E402
    REFERENCE_TOKENS,
    Comparison,
    Figures,
    as_json,
    broken,
    ranking,
    report,
)
from benchmark.simulation.calibrate import (  # noqa: E402
    DECODES,
    PREFILLS,
    Measurements,
    fit,
    measured_server,
    residuals,
)
from benchmark.simulation.links import LinkSample, fit_link  # noqa: E402
from benchmark.simulation.probe import DecodeSample, PrefillSample  # noqa: E402

from tiered_kv.scheduler.measured_costs import PassTimes  # noqa: E402

TIMES = PassTimes(
    prefill_fixed_s=0.08,
    prefill_request_s=0.02,
    prefill_token_s=0.0033,
    prefill_pair_s=4e-7,
    prefill_cached_s=2e-5,
    decode_fixed_s=0.045,
    decode_request_s=0.012,
    decode_context_s=1.2e-5,
)


def samples(noise: float = 0.0) -> Measurements:
    """What the probes find on a server whose passes take `TIMES`."""
    random = np.random.default_rng(1)

    def noisy(seconds: float) -> float:
        return seconds * float(random.lognormal(0.0, noise))

    prefills = [
        PrefillSample(chunks, noisy(TIMES.prefill_fixed_s + TIMES.prefill_s(chunks)))
        for n, new, cached in PREFILLS
        for chunks in [((new, cached),) * n]
    ]
    decodes = [
        DecodeSample(n, n * cached, noisy(TIMES.decode_fixed_s + TIMES.decode_s(n * cached, n)))
        for n, cached in DECODES
    ]
    return Measurements(tuple(prefills), tuple(decodes), 0.02)


def test_the_settings_that_are_probed_tell_all_coefficients_apart() -> None:
    assert asdict(fit(samples())) == pytest.approx(asdict(TIMES), rel=1e-6)


def test_noise_of_a_few_percent_moves_fitted_passes_by_no_more() -> None:
    noisy = samples(noise=0.03)
    exact = [measured for _, measured, _ in residuals(samples(), TIMES)]
    fitted = [seconds for _, _, seconds in residuals(noisy, fit(noisy))]
    assert fitted == pytest.approx(exact, rel=0.06)


def test_waves_keep_a_first_come_server_as_busy_as_asked() -> None:
    server = measured_server(samples())
    interval_s = interval_for(server)
    workload = waves(interval_s)
    arrivals = [request.arrival_s for request in workload.requests]
    assert len(workload) == 60
    assert arrivals[20] == pytest.approx(interval_s)
    end_s = simulated(server, simulate(server, "fcfs", interval_s)).end_s
    # The last wave ends early: a wave's share of the interval is LOAD only on average.
    assert end_s == pytest.approx((2 + LOAD) * interval_s, rel=0.15)


def figures(ttft_s: float, hits: int = 1000) -> Figures:
    return Figures(ttft_s, 2 * ttft_s, hits, 0.1, 60.0)


def compared(policy: str, measured_s: float, simulated_s: float) -> Comparison:
    return Comparison(policy, figures(measured_s), figures(simulated_s))


def test_what_is_too_far_apart_is_named() -> None:
    near = [compared("a", 10.0, 11.0), compared("b", 5.0, 4.5)]
    assert broken(near) == []
    far = replace(near[0], simulated=figures(11.0, hits=700))
    assert broken([far, near[1]]) == ["a: hit_tokens is off by -30.0%"]


def test_an_order_that_differs_is_named_unless_it_is_a_tie() -> None:
    assert ranking([compared("a", 10.0, 5.0), compared("b", 8.0, 6.0)]) == ["a and b"]
    assert ranking([compared("a", 10.0, 5.0), compared("b", 9.8, 6.0)]) == []
    assert ranking([compared("a", 10.0, 6.0), compared("b", 8.0, 5.0)]) == []


def test_latency_and_bandwidth_of_a_link_are_told_apart() -> None:
    edge = ("disk", "host")
    found = [
        LinkSample(edge, n_bytes, n_transfers, 0.002 * n_transfers + n_bytes / 5e8)
        for n_bytes, n_transfers in ((10e6, 1), (20e6, 1), (40e6, 2))
    ]
    other = LinkSample(("host", "disk"), 1e6, 1, 9.0)
    link = fit_link([*found, other], edge)
    assert link.latency_s == pytest.approx(0.002)
    assert link.bandwidth == pytest.approx(5e8)


def test_a_report_shows_both_and_whether_the_machine_kept_its_pace() -> None:
    found = samples()
    server = measured_server(found)
    slow_s = 1.5 * (TIMES.prefill_fixed_s + TIMES.prefill_s(((REFERENCE_TOKENS, 0),)))
    compared_ones = [
        replace(compared("fcfs", 10.0, 11.0), reference_s=(slow_s, slow_s)),
        compared("lpm", 5.0, 9.0),
    ]
    text = report(found, server, "Questions.", compared_ones)
    assert "| fcfs | server | 10.00 s | 20.00 s | 1,000 |" in text
    assert "| | error | +10.0% | +10.0% | +0.0% |" in text
    assert "before and after fcfs a prefill took +50% and +50%" in text
    assert "- lpm: ttft_mean_s is off by +80.0%" in text
    document = json.loads(json.dumps(as_json(found, 30.0, compared_ones)))
    assert [policy["policy"] for policy in document["policies"]] == ["fcfs", "lpm"]
