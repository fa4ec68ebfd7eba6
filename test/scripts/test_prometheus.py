"""The rules and the dashboard of docker/: they are valid, and ask for metrics that exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.exposition import choose_encoder

from harness.prometheus import has
from tiered_kv.metrics import names
from tiered_kv.metrics.names import Kind, Metric

DOCKER = Path(__file__).parents[2] / "docker"
RULES = DOCKER / "prometheus/alerts.yml"
DASHBOARD = DOCKER / "grafana/dashboards/tiered_kv.json"


def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(RULES.read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return [panel for panel in found if panel["type"] != "row"]


def expressions() -> list[str]:
    of_panels = [target["expr"] for panel in panels() for target in panel["targets"]]
    return [*of_panels, *(alert["expr"] for alert in alerts())]


def series_of(metric: Metric) -> set[str]:
    if metric.kind is Kind.HISTOGRAM:
        return {f"{metric.name}_{end}" for end in ("bucket", "sum", "count")}
    return {metric.name}


def test_what_is_asked_for_exists() -> None:
    known = {series for metric in names.ALL for series in series_of(metric)}
    asked = set()
    for expression in expressions():
        asked |= set(re.findall(r"sglang:tiered_kv_\w+", expression)) - {"sglang:tiered_kv_"}
    assert asked
    assert asked <= known


def test_every_alert_says_what_to_look_at_and_is_tested() -> None:
    tested = (DOCKER / "prometheus/alerts_test.yml").read_text()
    for alert in alerts():
        assert alert["labels"]["severity"] in ("page", "ticket")
        assert alert["annotations"]["summary"].endswith(".")
        assert f"alertname: {alert['alert']}\n        exp_alerts" in tested


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


def promtool(*command: str) -> None:
    result = subprocess.run(
        ["promtool", *command],
        cwd=RULES.parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.skipif(shutil.which("promtool") is None, reason="there is no promtool")
def test_alerts_fire_when_they_should() -> None:
    promtool("test", "rules", "alerts_test.yml")


@pytest.mark.skipif(not has("promtool"), reason="there is no promtool of 2.49 or later")
def test_the_configuration_is_valid() -> None:
    promtool("check", "config", "prometheus.yml")


def test_names_are_those_of_the_workers() -> None:
    """Prometheus 2 would get sglang_ for sglang: from the workers' client library."""
    (workers, _) = yaml.safe_load((RULES.parent / "prometheus.yml").read_text())["scrape_configs"]
    accepts = {"PrometheusText0.0.4": "text/plain;version=0.0.4"}
    (protocol,) = workers["scrape_protocols"]
    registry = CollectorRegistry()
    metric = names.PROMPT_TOKENS
    Counter(metric.name, metric.help, registry=registry).inc()
    encode, _ = choose_encoder(f"{accepts[protocol]};q=0.5,*/*;q=0.1")
    assert f"\n{metric.name} 1.0\n" in encode(registry).decode()
