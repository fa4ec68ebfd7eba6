"""Our metrics in upstream's Prometheus registry (`--enable-metrics`); names in metrics/names.py."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from tiered_kv.api.cache_order import TIERS
from tiered_kv.api.slo import objectives_met
from tiered_kv.core.ids import Tier
from tiered_kv.memory.keeps import KEEP_TIERS, Keeps
from tiered_kv.metrics import names
from tiered_kv.metrics.names import Kind, Metric
from tiered_kv.plugin.requests.view import store_tokens
from tiered_kv.tiers.shared.link import OPERATIONS

if TYPE_CHECKING:
    from tiered_kv.scheduler.request import QueuedRequest
    from tiered_kv.tiers.disk.stats import DiskStats
    from tiered_kv.tiers.disk.tier import DiskTier
    from tiered_kv.tiers.hierarchy import KVHierarchy
    from tiered_kv.tiers.shared.link import StoreLink
    from tiered_kv.tiers.transfer import TransferQueue

#: Gauges change with every page; scrapes come every few seconds.
REFRESH_S = 1.0
#: So many tenants have a label of their own; names are the callers' inventions.
TENANTS_MAX = 16
OTHER_TENANTS = "others"


class MetricsRecorder:
    """Records nothing: the server runs without `--enable-metrics`."""

    def transferred(
        self, source: Tier, target: Tier, n_pages: int, n_bytes: int, seconds: float
    ) -> None:
        pass

    def unwritten(self, target: Tier, n_pages: int) -> None:
        pass

    def failed_load(self) -> None:
        """A forward pass ran over pages that could not be copied to the device."""

    def finished(self, req: Any) -> None:
        pass

    def admitted(self, request: QueuedRequest, now_s: float) -> None:
        pass

    def first_token(self, request: QueuedRequest) -> None:
        pass

    def answered(self, request: QueuedRequest) -> None:
        pass

    def longest_wait(self, over_bound_s: float) -> None:
        pass

    def decoded(self, context_tokens: int, read_tokens: int) -> None:
        """A decode batch is launched that attends to so many tokens, and reads so many of them."""

    def some_parked(self) -> None:
        """Somebody who runs is left out of this decode."""

    def made_way(self) -> None:
        """Somebody who ran waits again, for another."""

    def ordered(self, action: str) -> None:
        """An administrator's order begins."""

    def refresh(
        self,
        hierarchy: KVHierarchy,
        disk: DiskTier | None,
        store: StoreLink | None,
        device_tokens: int,
    ) -> bool:
        """Brings the gauges up to date, if it is time to; returns whether it was."""
        return False


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
                options["buckets"] = metric.buckets
            self._metrics[metric.name] = kinds[metric.kind](
                metric.name, metric.help, labelnames=[*labels, *metric.labels], **options
            )
        # What is counted from the first is there from the first, as 0.
        self._decoded = (self._of(names.DECODE_CONTEXT_TOKENS), self._of(names.DECODE_READ_TOKENS))
        self._partial_decodes = self._of(names.PARTIAL_DECODES)
        self._made_way = self._of(names.MADE_WAY)
        self._failed_loads = self._of(names.FAILED_LOADS)
        for target in (Tier.HOST, Tier.DISK):
            self.unwritten(target, 0)
            self._of(names.KEEPS_GIVEN_UP, tier=target.name.lower())
        for action in TIERS:
            self._of(names.ORDERS, action=action)
        self._refreshed_at = 0.0
        # What the counters of disk and store said last.
        self._totals: dict[tuple[str, ...], float] = {}
        # Tenants who have a label of their own; "" is whoever orders for none.
        self._tenants: dict[Tier, dict[str, None]] = {tier: {"": None} for tier in KEEP_TIERS}

    def _of(self, metric: Metric, **labels: str) -> Any:
        return self._metrics[metric.name].labels(**self._labels, **labels)

    def transferred(
        self, source: Tier, target: Tier, n_pages: int, n_bytes: int, seconds: float
    ) -> None:
        edge = _edge(source, target)
        self._of(names.TRANSFER_BYTES, **edge).inc(n_bytes)
        self._of(names.TRANSFER_SECONDS, **edge).observe(seconds)

    def unwritten(self, target: Tier, n_pages: int) -> None:
        self._of(names.UNWRITTEN_PAGES, target=target.name.lower()).inc(n_pages)

    def failed_load(self) -> None:
        self._failed_loads.inc()

    def finished(self, req: Any) -> None:
        """Counts where the KV of a finished request's prompt came from."""
        self._of(names.PROMPT_TOKENS).inc(len(req.origin_input_ids))
        for tier, n_tokens in (
            (Tier.DEVICE, req.cached_tokens_device),
            (Tier.HOST, req.cached_tokens_host),
            (Tier.DISK, req.cached_tokens_storage - store_tokens(req)),
            (Tier.STORE, store_tokens(req)),
        ):
            if n_tokens:
                self._of(names.HIT_TOKENS, tier=tier.name.lower()).inc(n_tokens)

    def admitted(self, request: QueuedRequest, now_s: float) -> None:
        """`request` runs for the first time."""
        waited_s = now_s - request.arrival_s
        self._of(names.WAIT_SECONDS, slo_class=request.slo.slo_class).observe(waited_s)

    def first_token(self, request: QueuedRequest) -> None:
        """`request` has its first token since `request.first_token_s`."""
        if request.slo.ttft_s is not None:
            assert request.first_token_s is not None
            slack_s = request.deadline_s - request.first_token_s
            self._of(names.FIRST_TOKEN_SLACK, slo_class=request.slo.slo_class).observe(slack_s)

    def answered(self, request: QueuedRequest) -> None:
        """`request` has its last token since `request.last_token_s`."""
        slo = request.slo
        if slo.ttft_s is None and slo.tbt_s is None:
            return
        met = str(meets_slo(request)).lower()
        self._of(names.SLO_REQUESTS, slo_class=slo.slo_class, met=met).inc()

    def longest_wait(self, over_bound_s: float) -> None:
        self._of(names.WAIT_OVER_BOUND).set(over_bound_s)

    def decoded(self, context_tokens: int, read_tokens: int) -> None:
        for counter, n_tokens in zip(self._decoded, (context_tokens, read_tokens), strict=True):
            counter.inc(n_tokens)

    def some_parked(self) -> None:
        self._partial_decodes.inc()

    def made_way(self) -> None:
        self._made_way.inc()

    def ordered(self, action: str) -> None:
        self._of(names.ORDERS, action=action).inc()

    def refresh(
        self,
        hierarchy: KVHierarchy,
        disk: DiskTier | None,
        store: StoreLink | None,
        device_tokens: int,
    ) -> bool:
        now = time.monotonic()
        if now - self._refreshed_at < REFRESH_S:
            return False
        self._refreshed_at = now
        context, page_size = hierarchy.context, hierarchy.context.page_size
        forest, held = context.forest, [Tier.DEVICE, Tier.HOST]
        if Tier.STORE in forest.tiers:  # As far as this server knows: what it wrote or read.
            held.append(Tier.STORE)
        resident = {tier: forest.resident_tokens(tier) for tier in held}
        pinned = {tier: forest.protected_tokens(tier) for tier in held}
        capacity = {Tier.DEVICE: device_tokens, Tier.HOST: context.host.n_pages * page_size}
        if disk is not None:
            stats = disk.stats()
            resident[Tier.DISK] = stats.pages * page_size
            capacity[Tier.DISK] = (
                stats.capacity // context.page_format(Tier.DISK).slot_bytes * page_size
            )
            self._refresh_disk(stats)
            self._of(names.DISK_SUSPENDED).set(int(not is_disk_in_use(hierarchy)))
        if store is not None:
            self._refresh_store(store)
        for metric, values in (
            (names.RESIDENT_TOKENS, resident),
            (names.CAPACITY_TOKENS, capacity),
            (names.PINNED_TOKENS, pinned),
        ):
            for tier, n_tokens in values.items():
                self._of(metric, tier=tier.name.lower()).set(n_tokens)
        self._refresh_keeps(context.manager.keeps, page_size)
        write_back = hierarchy.write_back
        queues: list[tuple[Tier, Tier, TransferQueue[Any]]] = [
            (Tier.DEVICE, Tier.HOST, write_back.to_host),
            (Tier.HOST, Tier.DEVICE, hierarchy.load_back.queue),
        ]
        for cold in hierarchy.colds:
            queues.append((Tier.HOST, cold.tier, cold.writes.queue))
            queues.append((cold.tier, Tier.HOST, cold.reads))
        for source, target, queue in queues:
            self._of(names.QUEUE_DEPTH, **_edge(source, target)).set(queue.in_flight)
        self._of(names.DEFERRED_NODES).set(write_back.n_deferred)
        self._of(names.WRITE_BACK_LIMIT).set(context.pacer.bytes_per_s)
        return True

    def _refresh_keeps(self, keeps: Keeps, page_size: int) -> None:
        for tier in KEEP_TIERS:
            # Those that kept something before, too: it may be nothing now.
            tenants = self._tenants[tier]
            n_pages = Counter(dict.fromkeys(tenants, 0))
            if len(tenants) == TENANTS_MAX:
                n_pages[OTHER_TENANTS] = 0
            for tenant, n in keeps.tenants(tier).items():
                if len(tenants) < TENANTS_MAX:
                    tenants[tenant] = None
                n_pages[tenant if tenant in tenants else OTHER_TENANTS] += n
            for tenant, n in n_pages.items():
                labels = {"tier": tier.name.lower(), "tenant": tenant}
                self._of(names.KEPT_TOKENS, **labels).set(n * page_size)
        for tier, n in keeps.given_up_pages.items():
            self._count_up(names.KEEPS_GIVEN_UP, n * page_size, tier=tier.name.lower())

    def _refresh_store(self, store: StoreLink) -> None:
        self._of(names.STORE_DEGRADED).set(int(store.is_degraded))
        stats = store.stats
        for operation in OPERATIONS:
            for outcome, counts in (("ok", stats.calls), ("failed", stats.failed)):
                labels = {"operation": operation, "outcome": outcome}
                self._count_up(names.STORE_CALLS, counts[operation], **labels)
            self._count_up(names.STORE_CALL_SECONDS, stats.seconds[operation], operation=operation)
        self._count_up(names.STORE_BAD_PAGES, stats.bad_pages)

    def _count_up(self, metric: Metric, total: float, **labels: str) -> None:
        """Prometheus wants increments."""
        counter, key = self._of(metric, **labels), (metric.name, *labels.values())
        counter.inc(total - self._totals.get(key, 0.0))
        self._totals[key] = total

    def _refresh_disk(self, stats: DiskStats) -> None:
        self._of(names.DISK_BYTES).set(stats.bytes_on_disk)
        self._of(names.DISK_DEGRADED).set(int(stats.degraded))
        self._of(names.DISK_PAGE_CACHE).set(int(not stats.direct_io_soon))
        for (path, operation), n_bytes in _disk_io(stats).items():
            self._count_up(names.DISK_IO_BYTES, n_bytes, path=path, operation=operation)


def is_disk_in_use(hierarchy: KVHierarchy) -> bool:
    """Whether what is computed now has a name under which it goes to the disk."""
    return any(cold.store is not None for cold in hierarchy.colds if cold.tier is Tier.DISK)


def meets_slo(request: QueuedRequest) -> bool:
    """Whether an answered request had its first token, and on average the others, in time."""
    first_s, last_s, slo = request.first_token_s, request.last_token_s, request.slo
    if first_s is None or last_s is None:
        return False
    n_gaps = request.output_tokens - 1
    return objectives_met(
        first_s - request.arrival_s,
        (last_s - first_s) / n_gaps if n_gaps > 0 else None,
        ttft_objective_s=slo.ttft_s,
        tbt_objective_s=slo.tbt_s,
    )


def _disk_io(stats: DiskStats) -> dict[tuple[str, str], int]:
    return {
        ("direct", "read"): stats.direct_read_bytes,
        ("direct", "write"): stats.direct_write_bytes,
        ("buffered", "read"): stats.buffered_read_bytes,
        ("buffered", "write"): stats.buffered_write_bytes,
    }


def _edge(source: Tier, target: Tier) -> dict[str, str]:
    return {"source": source.name.lower(), "target": target.name.lower()}
