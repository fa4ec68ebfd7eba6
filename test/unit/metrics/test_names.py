"""The table of metrics: well-formed for Prometheus, and documented."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tiered_kv.metrics import names
from tiered_kv.metrics.names import Kind, Metric

OPERATIONS = Path(__file__).resolve().parents[3] / "docs" / "operations.md"


@pytest.mark.parametrize("metric", names.ALL, ids=lambda metric: metric.name)
def test_names_follow_the_conventions(metric: Metric) -> None:
    assert re.fullmatch(r"sglang:tiered_kv_[a-z_]+", metric.name)
    assert metric.name.endswith("_total") == (metric.kind is Kind.COUNTER)
    assert metric.help.endswith(".")


@pytest.mark.parametrize("metric", names.ALL, ids=lambda metric: metric.name)
def test_every_metric_is_in_the_operations_guide(metric: Metric) -> None:
    lines = OPERATIONS.read_text().splitlines()
    (row,) = [line for line in lines if line.startswith(f"| `{metric.name}`")]
    assert metric.kind.value in row
    for label in metric.labels:
        assert label in row


def test_names_are_unique_and_the_table_is_complete() -> None:
    declared = [value for value in vars(names).values() if isinstance(value, Metric)]
    assert set(declared) == set(names.ALL)
    assert len({metric.name for metric in names.ALL}) == len(names.ALL)
