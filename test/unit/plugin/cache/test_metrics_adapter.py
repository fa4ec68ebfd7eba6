"""The Prometheus recorder, against a registry of its own."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import prometheus_client
import pytest

from support_tiers.shared_blobs import SharedBlobs
from tiered_kv.api.slo import Slo
from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.memory.keeps import KeepBounds, Keeps
from tiered_kv.metrics import names
from tiered_kv.plugin.cache.metrics_adapter import (
    OTHER_TENANTS,
    TENANTS_MAX,
    MetricsRecorder,
    PrometheusRecorder,
)
from tiered_kv.plugin.requests.reports import tell_stores_apart
from tiered_kv.scheduler.request import QueuedRequest
from tiered_kv.tiers.disk.io_path import IoMode
from tiered_kv.tiers.disk.store import DiskStore
from tiered_kv.tiers.shared.link import StoreLink

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


def waiting(**times: float) -> QueuedRequest:
    slo = Slo("interactive", ttft_s=0.5, tbt_s=0.05)
    request = QueuedRequest(
        request_id=1,
        arrival_s=10.0,
        root=Forest(1).root(bytes(32)),
        tokens=array("q", [1]),
        prompt_tokens=1,
        max_new_tokens=8,
        slo=slo,
    )
    request.output_tokens = 5
    request.first_token_s = times.get("first_s", 10.3)
    request.last_token_s = times.get("last_s", 10.4)
    return request


def test_waits_and_slack_are_told_by_class(
    registry: prometheus_client.CollectorRegistry,
) -> None:
    recorder = PrometheusRecorder(LABELS)
    recorder.admitted(waiting(), now_s=10.2)
    recorder.first_token(waiting())
    recorder.first_token(waiting(first_s=10.7))
    labels = {**LABELS, "slo_class": "interactive"}
    wait, slack = names.WAIT_SECONDS.name, names.FIRST_TOKEN_SLACK.name
    assert registry.get_sample_value(f"{wait}_sum", labels) == pytest.approx(0.2)
    assert registry.get_sample_value(f"{slack}_count", labels) == 2
    assert registry.get_sample_value(f"{slack}_bucket", {**labels, "le": "0.0"}) == 1


@pytest.mark.parametrize(
    ("times", "met"),
    [
        ({}, "true"),
        ({"first_s": 10.51, "last_s": 10.6}, "false"),
        ({"last_s": 10.51}, "false"),  # 4 more tokens in 0.21 s
    ],
)
def test_objectives_met_and_missed(
    registry: prometheus_client.CollectorRegistry, times: dict[str, float], met: str
) -> None:
    recorder = PrometheusRecorder(LABELS)
    recorder.answered(waiting(**times))
    value = registry.get_sample_value(
        names.SLO_REQUESTS.name, {**LABELS, "slo_class": "interactive", "met": met}
    )
    assert value == 1


def test_hits_and_calls_of_the_shared_store(
    registry: prometheus_client.CollectorRegistry,
) -> None:
    recorder = PrometheusRecorder(LABELS)
    recorder.finished(
        SimpleNamespace(
            origin_input_ids=range(100),
            cached_tokens_device=0,
            cached_tokens_host=0,
            cached_tokens_storage=48,
            tiered_kv_store_tokens=32,
        )
    )
    hits = names.HIT_TOKENS.name
    assert registry.get_sample_value(hits, {**LABELS, "tier": "store"}) == 32
    assert registry.get_sample_value(hits, {**LABELS, "tier": "disk"}) == 16

    link = StoreLink(SharedBlobs())
    link.read(lambda: 1)
    link.count_bad()

    def fail() -> None:
        raise ConnectionError

    for n_failed in (1, 2):
        link.ask(fail)
        link.asking._retry_at = 0.0
        recorder._refresh_store(link)
        failed = {**LABELS, "operation": "ask", "outcome": "failed"}
        assert registry.get_sample_value(names.STORE_CALLS.name, failed) == n_failed
    came = {**LABELS, "operation": "read", "outcome": "ok"}
    assert registry.get_sample_value(names.STORE_CALLS.name, came) == 1
    assert registry.get_sample_value(names.STORE_BAD_PAGES.name, LABELS) == 1
    assert registry.get_sample_value(names.STORE_DEGRADED.name, LABELS) == 1


def test_what_is_kept_by_tenant_of_whom_few_have_a_label(
    registry: prometheus_client.CollectorRegistry,
) -> None:
    recorder, keeps = PrometheusRecorder(LABELS), Keeps()
    for n in range(40):
        page = bytes([n]) * 32
        keeps.grant(Tier.HOST, f"tenant {n}", [page], 1.0 + n, KeepBounds(100, 100))
        recorder._refresh_keeps(keeps, 16)
    keeps.gave_way(Tier.HOST, page, 1)
    recorder._refresh_keeps(keeps, 16)
    samples = [
        sample
        for family in registry.collect()
        for sample in family.samples
        if sample.name == names.KEPT_TOKENS.name and sample.labels["tier"] == "host"
    ]
    assert len(samples) == TENANTS_MAX + 1
    assert sum(sample.value for sample in samples) == 40 * 16
    by_tenant = {sample.labels["tenant"]: sample.value for sample in samples}
    assert (by_tenant["tenant 3"], by_tenant[""]) == (16, 0)
    assert by_tenant[OTHER_TENANTS] == (40 - TENANTS_MAX + 1) * 16
    given_up = {**LABELS, "tier": "host"}
    assert registry.get_sample_value(names.KEEPS_GIVEN_UP.name, given_up) == 16
    for _ in range(40):
        keeps.end(100.0)
    recorder._refresh_keeps(keeps, 16)
    kept = {**LABELS, "tier": "host", "tenant": "tenant 3"}
    assert registry.get_sample_value(names.KEPT_TOKENS.name, kept) == 0
    recorder.ordered("drop")
    orders = {**LABELS, "action": "drop"}
    assert registry.get_sample_value(names.ORDERS.name, orders) == 1


@pytest.mark.parametrize(
    ("storage", "store", "backend"),
    [(48, 32, "disk+store"), (48, 48, "store"), (48, 0, "disk"), (16, 32, "store"), (0, 0, "none")],
)
def test_answers_tell_the_store_from_the_disk(storage: int, store: int, backend: str) -> None:
    req = SimpleNamespace(cached_tokens_storage=storage, tiered_kv_store_tokens=store)
    details = {"device": 0, "host": 8, "storage": storage, "storage_backend": "DiskTier"}
    server = SimpleNamespace(tree_cache=SimpleNamespace(parts=SimpleNamespace(store=None)))
    tell_stores_apart(details, server, req)
    assert details["storage_backend"] == "DiskTier", "there is no store"
    server.tree_cache.parts.store = object()
    tell_stores_apart(details, server, req)
    assert details["store"] == min(storage, store)
    assert details["storage_backend"] == backend
    tell_stores_apart(None, server, req)
