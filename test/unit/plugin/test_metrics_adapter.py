"""The Prometheus recorder, against a registry of its own."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import prometheus_client
import pytest

from tiered_kv.core.ids import Tier
from tiered_kv.metrics import names
from tiered_kv.plugin.metrics_adapter import MetricsRecorder, PrometheusRecorder

LABELS = {"model_name": "m", "tp_rank": "0"}


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[prometheus_client.CollectorRegistry]:
    registry = prometheus_client.CollectorRegistry()
    for kind in ("Counter", "Gauge", "Histogram"):
        original = getattr(prometheus_client, kind)

        def in_registry(*args: object, _make: type = original, **kwargs: object) -> object:
            return _make(*args, registry=registry, **kwargs)

        monkeypatch.setattr(prometheus_client, kind, in_registry)
    return registry


def test_transfers_count_bytes_and_time_per_edge(
    registry: prometheus_client.CollectorRegistry,
) -> None:
    recorder = PrometheusRecorder(LABELS)
    recorder.transferred(Tier.DISK, Tier.HOST, 2, 2048, 0.02)
    recorder.transferred(Tier.DISK, Tier.HOST, 1, 1024, 0.5)
    edge = {**LABELS, "source": "disk", "target": "host"}
    assert registry.get_sample_value(names.TRANSFER_BYTES.name, edge) == 3072
    seconds = names.TRANSFER_SECONDS.name
    assert registry.get_sample_value(f"{seconds}_count", edge) == 2
    assert registry.get_sample_value(f"{seconds}_bucket", {**edge, "le": "0.03"}) == 1


def test_finished_requests_count_hits_by_tier(
    registry: prometheus_client.CollectorRegistry,
) -> None:
    recorder = PrometheusRecorder(LABELS)
    recorder.finished(
        SimpleNamespace(
            origin_input_ids=range(100),
            cached_tokens_device=16,
            cached_tokens_host=32,
            cached_tokens_storage=0,
        )
    )
    assert registry.get_sample_value(names.PROMPT_TOKENS.name, LABELS) == 100
    hits = names.HIT_TOKENS.name
    assert registry.get_sample_value(hits, {**LABELS, "tier": "device"}) == 16
    assert registry.get_sample_value(hits, {**LABELS, "tier": "host"}) == 32
    assert registry.get_sample_value(hits, {**LABELS, "tier": "disk"}) is None


def test_without_metrics_nothing_is_registered(
    registry: prometheus_client.CollectorRegistry,
) -> None:
    MetricsRecorder().transferred(Tier.DISK, Tier.HOST, 1, 1, 1.0)
    assert list(registry.collect()) == []
