"""The comparison of request orders, without a server."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmark.simulation.orders import simulated
from benchmark.simulation.orders_load import OBJECTIVES, whole_prefill_s, workload
from benchmark.simulation.orders_report import (
    Outcome,
    Pair,
    Wave,
    disagreements,
    outcome_of,
    report,
)
from benchmark.simulation.pace import Pace
from support_simulation.builders import CPU_TIMES
from tiered_kv.simulation.measured_server import MeasuredServer

SERVER = MeasuredServer(
    host="a machine",
    model="SmolLM2-135M",
    element_bytes=4,
    times=CPU_TIMES,
    request_overhead_s=0.02,
)


def test_loads_are_the_same_requests_closer_together() -> None:
    calm, full = (workload(SERVER, 40, load).requests for load in (0.5, 1.0))
    assert [r.blocks for r in calm] == [r.blocks for r in full]
    assert [r.slo_class for r in calm] == [r.slo_class for r in full]
    assert [r.arrival_s for r in calm] == pytest.approx([2 * r.arrival_s for r in full])
    assert {r.slo_class for r in full} == {name for name, *_ in OBJECTIVES}


def test_objectives_are_multiples_of_a_whole_prefill() -> None:
    unit_s = whole_prefill_s(SERVER)
    assert unit_s > 0.0033 * 400
    for request in workload(SERVER, 20, 1.0).requests:
        ((ttft, tbt),) = [(t, b) for name, _, t, b in OBJECTIVES if name == request.slo_class]
        assert request.ttft_slo_s == pytest.approx(ttft * unit_s)
        assert request.tbt_slo_s == (None if tbt is None else pytest.approx(tbt * unit_s))


def test_slack_has_more_in_time_than_the_order_of_arrival() -> None:
    load = workload(SERVER, 60, 1.2)
    slack, fcfs = (outcome_of([simulated(SERVER, policy, load)]) for policy in ("slack", "fcfs"))
    assert slack.in_time > 1.5 * fcfs.in_time
    assert slack.in_time_by_class.keys() == fcfs.in_time_by_class.keys()


def test_an_outcome() -> None:
    calm = Wave([("a", True), ("a", False), ("b", True)], [1.0, 2.0, 3.0], 7, 4.0, 2.0)
    outcome = outcome_of([calm])
    assert outcome.in_time == pytest.approx(2 / 3)
    assert outcome.in_time_by_class == {"a": 0.5, "b": 1.0}
    assert outcome.goodput == 1.0
    assert outcome.ttft_mean == 1.0
    # The machine took twice as long for everything: the same in its own unit.
    slow = Wave(calm.met, [2.0, 4.0, 6.0], 7, 8.0, 4.0)
    both = outcome_of([calm, slow])
    assert both.in_time_by_class == outcome.in_time_by_class
    assert (both.goodput, both.ttft_mean, both.hit_tokens) == (1.0, 1.0, 14)


def test_waves_are_parts_of_the_load() -> None:
    whole = workload(SERVER, 20, 1.0).requests
    first, second = (workload(SERVER, 20, 1.0, part) for part in (slice(0, 12), slice(12, 24)))
    assert [r.blocks for r in (*first.requests, *second.requests)] == [r.blocks for r in whole]
    assert [r.slo_class for r in second.requests] == [r.slo_class for r in whole[12:]]
    apart = [r.arrival_s - whole[11].arrival_s for r in whole[12:]]
    assert [r.arrival_s for r in second.requests] == pytest.approx(apart)


def test_only_pairs_that_are_apart_are_ranked() -> None:
    base = Outcome(0.5, {name: 0.5 for name, *_ in OBJECTIVES}, 1.0, 1.0, 2.0, 3.0, 4)
    real = {"fcfs": base, "x": replace(base, in_time=0.9), "y": replace(base, in_time=0.52)}
    model = {"fcfs": base, "x": replace(base, in_time=0.4), "y": replace(base, in_time=0.3)}
    assert disagreements(real, real) == []
    assert disagreements(real, model) == ["fcfs and x"]
    pairs = {name: Pair(real[name], model[name], (Pace(1.1, 0.9),)) for name in real}
    text = report({1.0: pairs}, 1.5, 60)
    assert "ranks otherwise: fcfs and x" in text
    assert "| x | 90% (40%) |" in text
    assert "| 0.20 |" in text  # a tenth late, of fcfs's half
