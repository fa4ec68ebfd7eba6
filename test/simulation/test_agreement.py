"""Fitting measured passes, and comparing a replay with a simulation; without a server."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmark.simulation.agreement import (
    simulate,
    simulated,
    waves,
)
from benchmark.simulation.agreement_report import (
    Comparison,
    Figures,
    as_json,
    broken,
    ranking,
    report,
)
from benchmark.simulation.links import LinkSample, fit_link
from benchmark.simulation.measure import (
    DECODES,
    PREFILLS,
    Measurements,
    fit,
    measured_server,
    residuals,
)
from benchmark.simulation.own_passes import own_pace, read_passes
from benchmark.simulation.pace import Pace, at_pace, between
from benchmark.simulation.probe import DecodeSample, PrefillSample
from support_simulation.builders import CPU_TIMES as TIMES
from tiered_kv.plugin.passes.pass_log import Pass, draw_passes
from tiered_kv.tiers.timeline import TimelineFile


def samples(noise: float = 0.0) -> Measurements:
    """What the probes find on a server whose passes take `TIMES`."""
    random = np.random.default_rng(1)

    def noisy(seconds: float) -> float:
        return seconds * float(random.lognormal(0.0, noise))

    prefills = [
        PrefillSample(chunks, noisy(TIMES.prefill_pass_s(chunks)))
        for n, new, cached in PREFILLS
        for chunks in [((new, cached),) * n]
    ]
    decodes = [
        DecodeSample(n, n * cached, noisy(TIMES.decode_pass_s(n * cached, n)))
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


def test_waves_are_the_workload_in_its_order() -> None:
    parts = waves()
    assert [len(wave) for wave in parts] == [20, 20, 20]
    assert [wave.requests[0].arrival_s for wave in parts] == [0.0, 0.0, 0.0]
    ids = [request.request_id for wave in parts for request in wave.requests]
    assert ids == sorted(ids)


def test_each_wave_is_simulated_at_its_own_pace() -> None:
    server = measured_server(samples())
    even = simulate(server, "fcfs", [Pace(1.0, 1.0)] * 3)
    slow = simulate(server, "fcfs", [Pace(1.0, 1.0), Pace(2.0, 2.0), Pace(1.0, 1.0)])
    ttfts = [[record.ttft_s or 0.0 for record in found] for found in (even, slow)]
    assert len(even) == 60
    assert ttfts[1][:20] == ttfts[0][:20]
    assert ttfts[1][20:40] == pytest.approx([2 * s for s in ttfts[0][20:40]], rel=0.05)
    # Its cache is what the waves before left, whatever their pace.
    assert [r.device_hit_tokens for r in slow[40:]] == [r.device_hit_tokens for r in even[40:]]
    assert simulated(slow).ttft_mean_s == pytest.approx(np.mean(ttfts[1]))


def test_a_pace_scales_prefills_and_decodes_apart() -> None:
    server = measured_server(samples())
    assert at_pace(server, Pace(1.0, 1.0)) == server
    times = at_pace(server, Pace(2.0, 3.0)).times
    assert times.prefill_token_s == 2 * server.times.prefill_token_s
    assert times.decode_fixed_s == 3 * server.times.decode_fixed_s
    assert between(Pace(1.0, 2.0), Pace(3.0, 4.0)) == Pace(2.0, 3.0)


def test_the_pace_of_passes_in_a_timeline(tmp_path: Path) -> None:
    timeline = TimelineFile(tmp_path / "trace.json")
    draw = draw_passes(timeline)
    start_s = time.monotonic()
    prefill_s = TIMES.prefill_fixed_s + TIMES.prefill_s([(64, 0), (32, 128)])
    decode_s = TIMES.decode_fixed_s + TIMES.decode_s(500, 4)

    def ran(at_s: float, seconds: float, *chunks: tuple[int, int], context: int = 0) -> None:
        mode = SimpleNamespace(name="EXTEND" if chunks else "DECODE")
        n_decodes = 0 if chunks else 4
        begun_s = start_s + at_s
        draw(Pass(mode, 4, 4, context, n_decodes, -1, begun_s, begun_s + seconds, chunks))

    ran(-5.0, 4.0, (64, 0))
    ran(0.0, 2 * prefill_s - 0.01, (64, 0), (32, 128))
    ran(2 * prefill_s, 3 * decode_s, context=500)
    ran(9.0, 3 * decode_s, context=500)
    timeline.close()
    passes = read_passes(tmp_path / "trace.json")
    begin_s = passes[1].start_s - 0.5
    pace = own_pace(passes, begin_s, begin_s + 20.0, TIMES)
    assert asdict(pace) == pytest.approx({"prefill": 2.0, "decode": 3.0}, rel=1e-3)
    with pytest.raises(ValueError, match="cut short"):
        own_pace(passes, begin_s + 1.0, begin_s + 2.0, TIMES)


def figures(ttft_s: float, hits: int = 1000) -> Figures:
    return Figures(ttft_s, 2 * ttft_s, hits, 0.1)


def compared(policy: str, measured_s: float, simulated_s: float) -> Comparison:
    return Comparison(policy, figures(measured_s), figures(simulated_s), figures(9.5))


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
    compared_ones = [
        replace(compared("fcfs", 10.0, 11.0), paces=(Pace(1.5, 1.25),), around=(Pace(1.0, 2.0),)),
        compared("lpm", 5.0, 9.0),
    ]
    text = report(found, server, "Questions.", compared_ones)
    assert "| fcfs | server | 10.00 s | 20.00 s | 1,000 |" in text
    assert "| | error | +10.0% | +10.0% | +0.0% |" in text
    assert "| fcfs | 1.50x / 1.25x | 1.00x / 2.00x | -5.0%, -5.0%, +0.0% |" in text
    assert "- lpm: ttft_mean_s is off by +80.0%" in text
    document = json.loads(json.dumps(as_json(found, compared_ones)))
    assert [policy["policy"] for policy in document["policies"]] == ["fcfs", "lpm"]
