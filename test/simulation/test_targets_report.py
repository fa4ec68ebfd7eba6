"""The report of `benchmark.simulation.targets`: the worst belief counts, and the best baseline."""

from __future__ import annotations

from typing import Any

from benchmark.simulation.targets_report import _targets, of


def run(name: str, goodput: float, *, load: float = 1.2, bias: float = 1.0) -> dict[str, Any]:
    labels = {"name": name, "load": load, "bias": bias, "part": "scaled"}
    nothing = {"n": 0, "mean": None}
    return {
        "labels": labels,
        "goodput_rps": goodput,
        "attainment": 0.5,
        "wait_s": {"max": 10.0 * goodput},
        "programs": {"completion_s": nothing, "waited_s": nothing},
    }


def test_the_worst_belief_and_the_best_baseline_of_each_load_count() -> None:
    baselines = [run("fcfs", 1.0), run("edf", 2.0), run("fcfs", 1.0, load=0.8)]
    slack = [run("slack", 3.5), run("slack", 2.9, bias=0.7), run("slack", 0.9, load=0.8)]
    goodput, never_below, wait = _targets([*baselines, *slack], [])
    assert goodput.startswith("- **Missed:**")
    assert "1.45 of edf's" in goodput
    assert never_below.startswith("- **Missed:**")
    assert "0.900 (load 0.8, belief 1)" in never_below
    assert "35.00 s (load 1.2)" in wait


def test_a_level_run_is_not_below() -> None:
    goodput, never_below, _ = _targets([run("fcfs", 1.0), run("slack", 1.5)], [])
    assert goodput.startswith("- Met:")
    assert never_below.startswith("- Met:")
    assert of([run("fcfs", 1.0)], name="edf") == []


def test_no_order_can_be_sooner_than_sessions_by_themselves() -> None:
    def taking(name: str, seconds: float) -> dict[str, Any]:
        took = {"n": 3, "mean": seconds}
        return {**run(name, 1.0), "programs": {"completion_s": took, "waited_s": took}}

    runs = [taking("fcfs", 600.0), taking("plas", 580.0), taking("slack", 560.0)]
    *_, by_fcfs, by_plas = _targets(runs, [taking("fcfs", 500.0)])
    assert "by 1.07 (600.00 s against 560.00 s)" in by_fcfs
    assert "no order can be sooner by more than 1.20" in by_fcfs
    assert "no order can be sooner by more than 1.16" in by_plas
