"""A real Prometheus with docker/prometheus' configuration, asked the questions of a dashboard."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
import yaml

from harness.child_process import ChildProcess
from harness.server import ServerError, free_port

ROOT = Path(__file__).parents[1]
CONFIGURATION = ROOT / "docker/prometheus/prometheus.yml"
DASHBOARDS = ROOT / "docker/grafana/dashboards"
START_TIMEOUT_S = 30.0


def has(program: str) -> bool:
    """Whether `prometheus` or `promtool` is there, in a release that knows the configuration.

    That is 2.49 or later; Debian 13 has it in its package `prometheus`.
    """
    if shutil.which(program) is None:
        return False
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    release = re.search(r"version (\d+)\.(\d+)", said.stdout + said.stderr)
    return release is not None and (int(release[1]), int(release[2])) >= (2, 49)


@dataclass(frozen=True)
class Query:
    panel: str
    expression: str


def panel_queries(dashboard: Path, interval: str) -> list[Query]:
    """What Grafana would ask for every panel, for all workers, with rates over `interval`."""
    panels = json.loads(dashboard.read_text())["panels"]
    return [
        Query(
            panel["title"],
            target["expr"].replace("$__rate_interval", interval).replace("$instance", ".*"),
        )
        for panel in panels
        for target in panel.get("targets", [])
    ]


@dataclass
class Prometheus(ChildProcess):
    """`with Prometheus(targets, folder) as it:` scrapes every second, with the committed rules.

    targets: the addresses of each job of the configuration, as host:port. folder: for its files.
    """

    targets: Mapping[str, Sequence[str]]
    folder: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Prometheus:
        self.folder.mkdir(parents=True, exist_ok=True)
        configuration = self.folder / "prometheus.yml"
        configuration.write_text(yaml.safe_dump(self._configuration()))
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={configuration}",
                    f"--storage.tsdb.path={self.folder / 'data'}",
                    f"--web.listen-address=127.0.0.1:{self.port}",
                ],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._is_ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill_9()
                raise ServerError((self.folder / "log").read_text(errors="replace")[-2000:])
            time.sleep(0.1)
        return self

    def _configuration(self) -> dict[str, Any]:
        document: dict[str, Any] = yaml.safe_load(CONFIGURATION.read_text())
        document["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        document["rule_files"] = [str(CONFIGURATION.parent / n) for n in document["rule_files"]]
        for job in document["scrape_configs"]:
            job["static_configs"] = [{"targets": list(self.targets.get(job["job_name"], ()))}]
        return document

    def _is_ready(self) -> bool:
        with contextlib.suppress(requests.RequestException):
            return requests.get(f"{self.url}/-/ready", timeout=5).status_code == 200
        return False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, expression: str) -> list[dict[str, Any]]:
        """The samples that it answers with, each with `metric` and `value`."""
        found = requests.get(f"{self.url}/api/v1/query", {"query": expression}, timeout=30).json()
        if found["status"] != "success":
            raise ServerError(f"{found['error']}: {expression}")
        samples: list[dict[str, Any]] = found["data"]["result"]
        return samples

    def has_numbers(self, expression: str) -> bool:
        """Whether it answers with at least one number; 0 / 0 is none."""
        return any(sample["value"][1] != "NaN" for sample in self.ask(expression))

    def alerts(self, state: str) -> set[str]:
        """The names of the alerts that are `firing`, or `pending`: they wait for their `for`."""
        found = requests.get(f"{self.url}/api/v1/alerts", timeout=30).json()["data"]["alerts"]
        return {alert["labels"]["alertname"] for alert in found if alert["state"] == state}
