"""The simulator says of a server what clients of the real one see.

The server is measured first, then a workload with shared prefixes is replayed on it under three
orders of its waiting queue and simulated with those measurements. It takes ten minutes and wants
two cores to itself: what a neighbour takes of them between two reference passes shows in the replay
and not in the simulation. `python -m benchmark.simulation.agreement` does the same and writes a
report.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmark.simulation.agreement import POLICIES, load_in_words, run
from benchmark.simulation.agreement_report import (
    TOLERANCE,
    Comparison,
    ranking,
    report,
)

pytestmark = [pytest.mark.long, pytest.mark.server, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def comparisons(demo_model: Path, logs: Path) -> dict[str, Comparison]:
    samples, server, found = run(demo_model, logs)
    print(report(samples, server, load_in_words(), found))
    return {comparison.policy: comparison for comparison in found}


@pytest.mark.parametrize("policy", POLICIES)
def test_ttft_and_hits_are_within_the_tolerance(
    comparisons: dict[str, Comparison], policy: str
) -> None:
    comparison = comparisons[policy]
    errors = comparison.errors()
    assert errors == pytest.approx(dict.fromkeys(errors, 0.0), abs=TOLERANCE), comparison


def test_policies_rank_alike(comparisons: dict[str, Comparison]) -> None:
    assert ranking(list(comparisons.values())) == []


def test_the_policies_differ_enough_to_be_ranked(comparisons: dict[str, Comparison]) -> None:
    arrival, longest_prefix = comparisons["fcfs"].measured, comparisons["lpm"].measured
    assert longest_prefix.ttft_mean_s < 0.8 * arrival.ttft_mean_s
    assert longest_prefix.hit_tokens > 1.05 * arrival.hit_tokens
