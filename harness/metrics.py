"""What a server's /metrics says."""

from __future__ import annotations

import time
from collections.abc import Mapping

from prometheus_client.parser import text_string_to_metric_families

from harness.server import Server, ServerError
from tiered_kv.metrics import names
from tiered_kv.metrics.names import Metric


class Scrape:
    """One reading of all samples."""

    def __init__(self, text: str) -> None:
        self._samples = [
            sample for family in text_string_to_metric_families(text) for sample in family.samples
        ]
        self.sample_names = {sample.name for sample in self._samples}

    def value(self, name: str, **labels: str) -> float:
        """The sum of the samples of that name with those labels; 0 if there is none."""
        return sum(
            sample.value
            for sample in self._samples
            if sample.name == name and _includes(sample.labels, labels)
        )

    def values_of(self, name: str, label: str) -> set[str]:
        """The values of that label among the samples of that name."""
        return {sample.labels[label] for sample in self._samples if sample.name == name}

    def of(self, metric: Metric, **labels: str) -> float:
        return self.value(metric.name, **labels)


def _includes(labels: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    return all(labels.get(name) == value for name, value in wanted.items())


def scrape(server: Server) -> Scrape:
    return Scrape(server.get("/metrics").text)


def wait_for_disk(server: Server, more_than: float = -1, timeout_s: float = 30) -> float:
    """Waits until nothing is on its way to the disk; returns the tokens that lie there.

    The gauges are refreshed once a second, so the same answer is wanted three times in a row, with
    more tokens on disk than `more_than`.
    """
    deadline = time.monotonic() + timeout_s
    seen: list[float] = []
    while time.monotonic() < deadline:
        now = scrape(server)
        pending = now.of(names.DEFERRED_NODES) + now.of(names.QUEUE_DEPTH)
        tokens = now.of(names.RESIDENT_TOKENS, tier="disk")
        seen = [*seen, tokens] if pending == 0 and tokens > more_than else []
        if len(seen) >= 3 and len(set(seen[-3:])) == 1:
            return tokens
        time.sleep(0.6)
    raise ServerError(f"the pages did not reach the disk within {timeout_s:.0f} s{server.tail()}")
