"""Our metrics in upstream's Prometheus registry (`--enable-metrics`); names in metrics/names.py."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from tiered_kv.core.ids import Tier
from tiered_kv.metrics import names
from tiered_kv.metrics.names import Kind, Metric

if TYPE_CHECKING:
    from tiered_kv.tiers.disk.stats import DiskStats
    from tiered_kv.tiers.disk.store import DiskStore
    from tiered_kv.tiers.hierarchy import KVHierarchy

#: Gauges change with every page; scrapes come every few seconds.
REFRESH_S = 1.0


class MetricsRecorder:
    """Records nothing: the server runs without `--enable-metrics`."""

    def transferred(
        self, source: Tier, target: Tier, n_pages: int, n_bytes: int, seconds: float
    ) -> None:
        pass

    def finished(self, req: Any) -> None:
        pass

    def refresh(self, hierarchy: KVHierarchy, disk: DiskStore | None, device_tokens: int) -> None:
        pass


class PrometheusRecorder(MetricsRecorder):
    """`labels`: those that upstream puts on the metrics of this process, with their values."""

    def __init__(self, labels: dict[str, str]) -> None:
        # Imported late: upstream sets PROMETHEUS_MULTIPROC_DIR before the first import.
        import prometheus_client

        kinds = {
            Kind.COUNTER: prometheus_client.Counter,
            Kind.GAUGE: prometheus_client.Gauge,
            Kind.HISTOGRAM: prometheus_client.Histogram,
        }
        self._labels = labels
        self._metrics: dict[str, Any] = {}
        for metric in names.ALL:
            options: dict[str, Any] = {}
            if metric.kind is Kind.GAUGE:
                options["multiprocess_mode"] = "mostrecent"
            elif metric.kind is Kind.HISTOGRAM:
                options["buckets"] = names.TRANSFER_SECONDS_BUCKETS
            self._metrics[metric.name] = kinds[metric.kind](
                metric.name, metric.help, labelnames=[*labels, *metric.labels], **options
            )
        self._refreshed_at = 0.0
        # What the counters of the store said last: Prometheus wants increments.
        self._disk_io: dict[tuple[str, str], int] = {}

    def _of(self, metric: Metric, **labels: str) -> Any:
        return self._metrics[metric.name].labels(**self._labels, **labels)

    def transferred(
        self, source: Tier, target: Tier, n_pages: int, n_bytes: int, seconds: float
    ) -> None:
        edge = _edge(source, target)
        self._of(names.TRANSFER_BYTES, **edge).inc(n_bytes)
        self._of(names.TRANSFER_SECONDS, **edge).observe(seconds)

    def finished(self, req: Any) -> None:
        """Counts where the KV of a finished request's prompt came from."""
        self._of(names.PROMPT_TOKENS).inc(len(req.origin_input_ids))
        for tier, n_tokens in (
            (Tier.DEVICE, req.cached_tokens_device),
            (Tier.HOST, req.cached_tokens_host),
            (Tier.DISK, req.cached_tokens_storage),
        ):
            if n_tokens:
                self._of(names.HIT_TOKENS, tier=tier.name.lower()).inc(n_tokens)

    def refresh(self, hierarchy: KVHierarchy, disk: DiskStore | None, device_tokens: int) -> None:
        now = time.monotonic()
        if now - self._refreshed_at < REFRESH_S:
            return
        self._refreshed_at = now
        context, page_size = hierarchy.context, hierarchy.context.page_size
        forest, held = context.forest, (Tier.DEVICE, Tier.HOST)
        resident = {tier: forest.resident_tokens(tier) for tier in held}
        pinned = {tier: forest.protected_tokens(tier) for tier in held}
        capacity = {Tier.DEVICE: device_tokens, Tier.HOST: context.host.n_pages * page_size}
        if disk is not None:
            stats = disk.stats()
            resident[Tier.DISK] = stats.pages * page_size
            capacity[Tier.DISK] = (
                stats.capacity // context.copier.page_format.slot_bytes * page_size
            )
            self._refresh_disk(stats)
        for metric, values in (
            (names.RESIDENT_TOKENS, resident),
            (names.CAPACITY_TOKENS, capacity),
            (names.PINNED_TOKENS, pinned),
        ):
            for tier, n_tokens in values.items():
                self._of(metric, tier=tier.name.lower()).set(n_tokens)
        write_back = hierarchy.write_back
        for source, target, queue in (
            (Tier.DEVICE, Tier.HOST, write_back.to_host),
            (Tier.HOST, Tier.DISK, write_back.to_disk),
            (Tier.HOST, Tier.DEVICE, hierarchy.load_back.queue),
            (Tier.DISK, Tier.HOST, hierarchy.prefetch.queue),
        ):
            self._of(names.QUEUE_DEPTH, **_edge(source, target)).set(queue.in_flight)
        self._of(names.DEFERRED_NODES).set(write_back.n_deferred)

    def _refresh_disk(self, stats: DiskStats) -> None:
        self._of(names.DISK_BYTES).set(stats.bytes_on_disk)
        self._of(names.DISK_DEGRADED).set(int(stats.degraded))
        self._of(names.DISK_PAGE_CACHE).set(int(not stats.direct_io_soon))
        for (path, operation), n_bytes in _disk_io(stats).items():
            counter = self._of(names.DISK_IO_BYTES, path=path, operation=operation)
            counter.inc(n_bytes - self._disk_io.get((path, operation), 0))
            self._disk_io[path, operation] = n_bytes


def _disk_io(stats: DiskStats) -> dict[tuple[str, str], int]:
    return {
        ("direct", "read"): stats.direct_read_bytes,
        ("direct", "write"): stats.direct_write_bytes,
        ("buffered", "read"): stats.buffered_read_bytes,
        ("buffered", "write"): stats.buffered_write_bytes,
    }


def _edge(source: Tier, target: Tier) -> dict[str, str]:
    return {"source": source.name.lower(), "target": target.name.lower()}
