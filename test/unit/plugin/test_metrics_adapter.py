"""The Prometheus recorder, against a registry of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import prometheus_client
import pytest

from tiered_kv.core.ids import Tier
from tiered_kv.metrics import names
from tiered_kv.plugin.metrics_adapter import MetricsRecorder, PrometheusRecorder
from tiered_kv.tiers.disk.io_path import IoMode
from tiered_kv.tiers.disk.store import DiskStore

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


def test_disk_io_is_counted_by_path(
    registry: prometheus_client.CollectorRegistry, tmp_path: Path
) -> None:
    """The store counts from its opening; the recorder passes on what is new."""
    recorder = PrometheusRecorder(LABELS)
    io_bytes = names.DISK_IO_BYTES.name
    written = {**LABELS, "path": "buffered", "operation": "write"}
    with DiskStore.open(
        tmp_path / "disk", capacity_bytes=8 << 20, io_mode=IoMode.BUFFERED
    ) as store:
        namespace = store.namespace(bytes(32), 4096)
        for n_pages in (1, 2, 3):
            namespace.write_pages([bytes([n_pages]) * 32], [memoryview(bytes(4096))])
            recorder._refresh_disk(store.stats())
            # A record is a header block and its page.
            assert registry.get_sample_value(io_bytes, written) == n_pages * 8192
    assert registry.get_sample_value(io_bytes, {**written, "path": "direct"}) == 0
    assert registry.get_sample_value(names.DISK_PAGE_CACHE.name, LABELS) == 1
    assert registry.get_sample_value(names.DISK_DEGRADED.name, LABELS) == 0


def test_without_metrics_nothing_is_registered(
    registry: prometheus_client.CollectorRegistry,
) -> None:
    MetricsRecorder().transferred(Tier.DISK, Tier.HOST, 1, 1, 1.0)
    assert list(registry.collect()) == []
