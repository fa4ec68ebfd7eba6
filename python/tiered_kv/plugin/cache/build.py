"""The composition root: from upstream's build context to a working prefix cache."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import psutil
import torch

from tiered_kv.core.config import TieredKVConfig
from tiered_kv.core.errors import ConfigError
from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.memory.manager import MemoryManager
from tiered_kv.plugin.cache import fingerprint, weight_updates
from tiered_kv.plugin.cache.costs import build_cost_model
from tiered_kv.plugin.cache.device_copier import make_copier
from tiered_kv.plugin.cache.device_pool import EngineAllocator, buffers_of
from tiered_kv.plugin.cache.disk import open_disk
from tiered_kv.plugin.cache.events import KvEvents
from tiered_kv.plugin.cache.formats import TierFormats, tier_formats
from tiered_kv.plugin.cache.metrics_adapter import MetricsRecorder, PrometheusRecorder
from tiered_kv.plugin.cache.residency_log import ResidencyLog
from tiered_kv.plugin.options.overlap import budget_share, rank_trace_file
from tiered_kv.plugin.passes.pass_log import Pass, PassLog, draw_passes, pace_by_decodes
from tiered_kv.plugin.passes.step_times import StepTimes
from tiered_kv.scheduler.calibration import Calibrator
from tiered_kv.scheduler.cost_model import CostModel, PlacementCosts
from tiered_kv.tiers.context import TierContext
from tiered_kv.tiers.device import After, PageCopier
from tiered_kv.tiers.disk.tier import DiskTier
from tiered_kv.tiers.disk_pages import DiskPages
from tiered_kv.tiers.hierarchy import KVHierarchy
from tiered_kv.tiers.host import HostPool
from tiered_kv.tiers.interference import InterferenceBudget
from tiered_kv.tiers.pacing import WriteBackPacer
from tiered_kv.tiers.timeline import TimelineFile
from tiered_kv.tiers.transfer import Collective, SingleRank

if TYPE_CHECKING:
    from sglang.srt.mem_cache.registry import TreeCacheBuildContext

    from tiered_kv.plugin.cache.prefix_cache import TieredPrefixCache

logger = logging.getLogger(__name__)

#: Host memory that the pool must leave to everything else.
HOST_RESERVE_BYTES = 1 << 30


class RankMinimum:
    """Agreement between tensor-parallel ranks over upstream's CPU group."""

    def __init__(self, group: torch.distributed.ProcessGroup) -> None:
        self._group = group

    def minimum(self, values: list[int]) -> list[int]:
        tensor = torch.tensor(values, dtype=torch.int64)
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MIN, group=self._group)
        return [int(value) for value in tensor.tolist()]


class HostReport:
    """What upstream's metrics reporter reads of a host pool, in tokens."""

    def __init__(self, host: HostPool) -> None:
        self._host = host
        self.logical_size = host.n_pages * host.page_format.page_size

    def available_size(self) -> int:
        return self._host.n_free * self._host.page_format.page_size


@dataclass(slots=True)
class CacheParts:
    """Everything the prefix cache is made of."""

    hierarchy: KVHierarchy
    disk_store: DiskTier | None
    events: KvEvents
    metrics: MetricsRecorder
    host_report: HostReport
    name_weights: Callable[[], tuple[bytes, DiskPages | None]]
    """Names the weights in use now, and opens their namespace on disk."""
    step_times: StepTimes
    residency: ResidencyLog
    """What became cached, or ceased to be, while somebody waits."""
    cost_model: CostModel | None
    pass_log: PassLog | None = None
    """None if nobody wants to know of every pass."""

    @property
    def controller_report(self) -> SimpleNamespace:
        """What upstream's output streamer reads of a cache controller."""
        return SimpleNamespace(storage_backend=self.disk_store)


def build_tree_cache(ctx: TreeCacheBuildContext) -> TieredPrefixCache:
    """Raises ConfigError or DiskTierError, one sentence each, if a tier cannot be set up."""
    from tiered_kv.plugin.cache.prefix_cache import TieredPrefixCache

    parts = build_parts(ctx)
    cache = TieredPrefixCache(ctx.params, parts)
    gate = parts.hierarchy.load_back.gate
    ctx.params.token_to_kv_pool_allocator.get_kvcache().register_layer_transfer_counter(gate)
    ctx.tp_worker.register_hicache_layer_transfer_counter(gate)
    weight_updates.track(cache)
    return cache


def build_parts(ctx: TreeCacheBuildContext) -> CacheParts:
    config: TieredKVConfig = ctx.server_args.to_config()
    params = ctx.params
    allocator = params.token_to_kv_pool_allocator
    pool = allocator.get_kvcache()
    device = buffers_of(pool)
    formats = tier_formats(config, device)
    on_cpu = device.buffers[0].device.type == "cpu"

    host = HostPool(
        formats.host,
        host_bytes(config, device.n_bytes, n_ranks=ctx.tp_size),
        register=None if on_cpu else register_for_dma,
    )
    args = ctx.server_args
    copier = make_copier(formats, device, host, args.tiered_kv_copy_path)
    timeline = open_timeline(args, ctx.tp_rank, copier)
    store = open_disk(config, ctx.tp_rank, ctx.tp_size, make_collective(ctx))

    def name_weights() -> tuple[bytes, DiskPages | None]:
        return name_namespace(ctx, pool, formats, store)

    namespace, disk = name_weights()
    events = KvEvents(params.page_size, params.enable_kv_cache_events)
    residency = ResidencyLog(events)
    metrics = make_metrics(ctx)
    forest = Forest(params.page_size)
    cost_model = build_cost_model(ctx, pool, formats.host)
    costs = None
    if cost_model is not None:
        costs = PlacementCosts(
            cost_model,
            bytes_per_token=formats.device.token_bytes,
            tier_bytes_per_token={
                Tier.HOST: formats.host.token_bytes,
                Tier.DISK: formats.disk.token_bytes,
            },
        )
    runner = ctx.tp_worker.model_runner
    context = TierContext(
        forest=forest,
        manager=MemoryManager(forest, config.memory, costs),
        copier=copier,
        allocator=EngineAllocator(allocator),
        host=host,
        disk=disk,
        collective=make_collective(ctx),
        listener=residency,
        observer=metrics,
        calibrator=None if cost_model is None else Calibrator(cost_model),
        order_after=tuple if on_cpu else lambda: launched_so_far(runner.forward_stream),
        disk_format=formats.disk,
        timeline=timeline,
        pacer=make_pacer(budget_share(args, on_cpu=on_cpu)),
    )
    log_sizes(host, pool.size, store)
    log_formats(formats)
    hierarchy = KVHierarchy(context, namespace)
    return CacheParts(
        hierarchy=hierarchy,
        disk_store=store,
        events=events,
        metrics=metrics,
        host_report=HostReport(host),
        name_weights=name_weights,
        step_times=StepTimes(hierarchy, synchronous=on_cpu),
        pass_log=make_pass_log(context, cost_model, synchronous=on_cpu),
        residency=residency,
        cost_model=cost_model,
    )


def host_bytes(config: TieredKVConfig, device_bytes: int, n_ranks: int) -> int:
    """The size of this rank's host pool. Raises ConfigError if the machine does not have it."""
    size = config.host.size_bytes
    if size is None:
        size = int(config.host.ratio * device_bytes)
    available = max(0, available_memory() - HOST_RESERVE_BYTES) // n_ranks
    if size > available:
        raise ConfigError(
            f"the host tier wants {size / 1e9:.2f} GB per rank but only {available / 1e9:.2f} GB "
            "of memory are free; lower --tiered-kv-host-size or --tiered-kv-host-ratio."
        )
    return size


def available_memory() -> int:
    """Bytes that can still be taken on this machine, or in this container if that is less."""
    available = int(psutil.virtual_memory().available)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return available
    return available if limit == "max" else min(available, int(limit) - used)


def register_for_dma(address: int, n_bytes: int) -> None:
    status = torch.cuda.cudart().cudaHostRegister(address, n_bytes, 0)
    if int(status) != 0:
        raise ConfigError(
            f"the host tier's {n_bytes / 1e9:.2f} GB cannot be pinned (CUDA error {int(status)}); "
            "lower --tiered-kv-host-size or raise the limit on locked memory (ulimit -l)."
        )


def open_timeline(server_args: Any, tp_rank: int, copier: PageCopier) -> TimelineFile | None:
    """Raises ConfigError if the file cannot be written."""
    path = rank_trace_file(server_args, tp_rank)
    if path is None:
        return None
    logger.info("Tiered KV: a timeline goes to %s; open it in ui.perfetto.dev.", path)
    copier.timed = True
    return TimelineFile(path)


def make_pacer(share: float | None) -> WriteBackPacer:
    return WriteBackPacer(None if share is None else InterferenceBudget(share))


def make_pass_log(
    context: TierContext, cost_model: CostModel | None, *, synchronous: bool
) -> PassLog | None:
    observers: list[Callable[[Pass], None]] = []
    if context.timeline is not None:
        observers.append(draw_passes(context.timeline))
    if context.pacer.is_wanted:
        observers.append(pace_by_decodes(context.pacer, cost_model))
    return PassLog(observers, synchronous=synchronous) if observers else None


def launched_so_far(forward_stream: torch.cuda.Stream) -> After:
    """A copy that waits for these sees all that forward passes launched until now have written."""
    events = []
    for stream in (torch.cuda.current_stream(), forward_stream):
        event = torch.cuda.Event()
        event.record(stream)
        events.append(event)
    return tuple(events)


def name_namespace(
    ctx: TreeCacheBuildContext, pool: Any, formats: TierFormats, store: DiskTier | None
) -> tuple[bytes, DiskPages | None]:
    started = time.perf_counter()
    namespace = fingerprint.namespace_of(
        ctx.tp_worker.model_runner.model,
        ctx.model_config,
        pool,
        # What lies on disk is what must not be misread: host pages end with this process.
        formats.disk,
        shard=f"{ctx.tp_rank} of {ctx.tp_size}",
    )
    logger.info("Tiered KV: named the weights in %.2f s.", time.perf_counter() - started)
    if store is None:
        return namespace, None
    description = f"{ctx.server_args.model_path} {pool.dtype} page {formats.disk.page_size}"
    if formats.disk_layout is not None and formats.disk.is_lossy:
        description += f" as {formats.disk_layout.format}"
    stored = store.namespace(namespace, formats.disk.page_bytes, description)
    return namespace, formats.on_disk(stored)


def make_collective(ctx: TreeCacheBuildContext) -> Collective:
    group = ctx.params.tp_cache_group
    return SingleRank() if ctx.tp_size == 1 or group is None else RankMinimum(group)


def make_metrics(ctx: TreeCacheBuildContext) -> MetricsRecorder:
    if not ctx.params.enable_metrics:
        return MetricsRecorder()
    served_name = ctx.server_args.served_model_name or ctx.server_args.model_path
    return PrometheusRecorder({"model_name": served_name, "tp_rank": str(ctx.tp_rank)})


def log_formats(formats: TierFormats) -> None:
    """Says that answers may change, if they may."""
    if formats.host_layout is None or formats.disk_layout is None:
        return
    logger.info(
        "Tiered KV: %.0f bytes of KV per token on the device, %.0f on the host (%s), %.0f on disk "
        "(%s): what was reused from there may change an answer.",
        formats.device.token_bytes,
        formats.host.token_bytes,
        formats.host_layout.format,
        formats.disk.token_bytes,
        formats.disk_layout.format,
    )


def log_sizes(host: HostPool, device_tokens: int, store: DiskTier | None) -> None:
    page_format = host.page_format
    disk = "off"
    if store is not None:
        stats = store.stats()
        disk = f"{stats.capacity / 1e9:.2f} GB, {stats.pages} pages stored"
    logger.info(
        "Tiered KV: pages of %d tokens, %.1f KiB; device %d tokens, host %d tokens (%.2f GB), "
        "disk %s.",
        page_format.page_size,
        page_format.page_bytes / 1024,
        device_tokens,
        host.n_pages * page_format.page_size,
        host.pages.nbytes / 1e9,
        disk,
    )
