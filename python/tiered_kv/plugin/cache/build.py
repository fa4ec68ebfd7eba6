"""The composition root: from upstream's build context to a working prefix cache."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool
from sglang.version import __version__ as sglang_release

from tiered_kv.core.config import TieredKVConfig
from tiered_kv.core.errors import ConfigError
from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.memory.manager import MemoryManager
from tiered_kv.plugin.cache import adapters, fingerprint, weight_updates
from tiered_kv.plugin.cache.costs import build_cost_model
from tiered_kv.plugin.cache.device_copier import make_copier
from tiered_kv.plugin.cache.device_pool import EngineAllocator, buffers_of
from tiered_kv.plugin.cache.disk import open_disk
from tiered_kv.plugin.cache.events import KvEvents
from tiered_kv.plugin.cache.formats import TierFormats, tier_formats
from tiered_kv.plugin.cache.metrics_adapter import MetricsRecorder, PrometheusRecorder
from tiered_kv.plugin.cache.parts import CacheParts, HostReport, RankMinimum
from tiered_kv.plugin.cache.pass_streams import launched_so_far, pass_holder
from tiered_kv.plugin.cache.residency_log import ResidencyLog
from tiered_kv.plugin.options.overlap import budget_share, rank_trace_file
from tiered_kv.plugin.passes.pass_log import Pass, PassLog, draw_passes, pace_by_decodes
from tiered_kv.plugin.passes.step_times import StepTimes
from tiered_kv.scheduler.calibration import Calibrator
from tiered_kv.scheduler.cost_model import CostModel, PlacementCosts
from tiered_kv.tiers import host_memory
from tiered_kv.tiers.cold.local_pages import LocalStore
from tiered_kv.tiers.context import TierContext
from tiered_kv.tiers.device import PageCopier
from tiered_kv.tiers.disk.tier import DiskTier
from tiered_kv.tiers.hierarchy import KVHierarchy
from tiered_kv.tiers.host import MIN_HOST_PAGES, HostPool
from tiered_kv.tiers.host_size import host_size
from tiered_kv.tiers.interference import InterferenceBudget
from tiered_kv.tiers.memory_limits import available_bytes
from tiered_kv.tiers.pacing import WriteBackPacer
from tiered_kv.tiers.page_format import PageFormat
from tiered_kv.tiers.page_store import PageStore
from tiered_kv.tiers.timeline import TimelineFile
from tiered_kv.tiers.transfer import Collective, SingleRank

if TYPE_CHECKING:
    from sglang.srt.mem_cache.registry import TreeCacheBuildContext

    from tiered_kv.plugin.cache.prefix_cache import TieredPrefixCache

logger = logging.getLogger(__name__)


def build_tree_cache(ctx: TreeCacheBuildContext) -> TieredPrefixCache:
    """Raises ConfigError or DiskTierError, one sentence each, if a tier cannot be set up."""
    from tiered_kv.plugin.cache.prefix_cache import TieredPrefixCache

    parts = build_parts(ctx)
    cache = TieredPrefixCache(ctx.params, parts)
    gate = parts.hierarchy.load_back.gate
    ctx.params.token_to_kv_pool_allocator.get_kvcache().register_layer_transfer_counter(gate)
    ctx.tp_worker.register_hicache_layer_transfer_counter(gate)
    weight_updates.track(cache, ctx.tp_worker)
    lora_manager = getattr(ctx.tp_worker.model_runner, "lora_manager", None)
    adapters.track(adapters.AdapterNames(lora_manager, make_collective(ctx)))
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
        host_bytes(
            config,
            device.n_bytes,
            formats.host,
            # The ranks of one machine: they are spread evenly.
            max(1, ctx.tp_size // ctx.server_args.nnodes),
            make_collective(ctx),
        ),
        register=None if on_cpu else register_for_dma,
    )
    args = ctx.server_args
    copier = make_copier(formats, device, host, args.tiered_kv_copy_path)
    timeline = open_timeline(args, ctx.tp_rank, copier)
    store = open_disk(config, ctx.tp_rank, ctx.tp_size, make_collective(ctx))

    def name_weights() -> tuple[bytes, tuple[PageStore, ...]]:
        return name_namespace(ctx, pool, formats, store)

    namespace, stores = name_weights()
    events = KvEvents(params.page_size, params.enable_kv_cache_events)
    residency = ResidencyLog(events)
    metrics = make_metrics(ctx)
    forest = Forest(params.page_size)
    cost_model = build_cost_model(ctx, pool, formats.host)
    costs = None if cost_model is None else placement_costs(cost_model, formats)
    runner = ctx.tp_worker.model_runner
    context = TierContext(
        forest=forest,
        manager=MemoryManager(forest, config.memory, costs),
        copier=copier,
        allocator=EngineAllocator(allocator),
        host=host,
        stores=stores,
        collective=make_collective(ctx),
        listener=residency,
        observer=metrics,
        calibrator=None if cost_model is None else Calibrator(cost_model),
        order_after=tuple if on_cpu else lambda: launched_so_far(runner.forward_stream),
        hold_passes=None
        if on_cpu
        else pass_holder(runner.forward_stream, overlaps=not args.disable_overlap_schedule),
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


def placement_costs(cost_model: CostModel, formats: TierFormats) -> PlacementCosts:
    return PlacementCosts(
        cost_model,
        bytes_per_token=formats.device.token_bytes,
        tier_bytes_per_token={
            Tier.HOST: formats.host.token_bytes,
            Tier.DISK: formats.disk.token_bytes,
        },
    )


def host_bytes(
    config: TieredKVConfig,
    device_bytes: int,
    page_format: PageFormat,
    n_ranks: int,
    collective: Collective,
) -> int:
    """The size of this rank's host pool; n_ranks: on this machine.

    Every rank must call it, and gets the same. Raises ConfigError if the machine does not have what
    was asked for by its size.
    """
    free = available_bytes()
    # Before any rank takes something: else the last to look would see what the others left.
    (agreed,) = collective.minimum([-1 if free is None else free])
    wished = int(config.host.ratio * device_bytes)
    size = host_size(
        named_bytes=config.host.size_bytes,
        wished_bytes=wished,
        least_bytes=MIN_HOST_PAGES * page_format.slot_bytes,
        free_bytes=None if agreed < 0 else agreed,
        n_ranks=n_ranks,
    )
    if config.host.size_bytes is None and size < wished:
        logger.warning(
            "Tiered KV: the host tier takes %.2f GB per rank instead of %.2f GB, %g times the "
            "device's pool: %.2f GB of memory are free for %d of them.",
            size / 1e9,
            wished / 1e9,
            config.host.ratio,
            agreed / 1e9,
            n_ranks,
        )
    return size


def register_for_dma(address: int, n_bytes: int) -> None:
    """Pins memory near the current device. Raises ConfigError.

    In one piece: a copy must not cross from one registered piece to the next.
    """
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    pci = f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"
    try:
        host_memory.prepare(address, n_bytes, host_memory.numa_node_of(pci))
    except OSError as error:
        raise ConfigError(
            f"the host tier's {n_bytes / 1e9:.2f} GB are not there ({error}); lower "
            "--tiered-kv-host-size."
        ) from None
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


def name_namespace(
    ctx: TreeCacheBuildContext, pool: Any, formats: TierFormats, store: DiskTier | None
) -> tuple[bytes, tuple[PageStore, ...]]:
    """The namespace of KV computed from now on, and where its pages are kept below the host.

    On several ranks all must call it at the same points.
    """
    started = time.perf_counter()
    model = ctx.tp_worker.model_runner.model
    collective = make_collective(ctx)
    checksum = fingerprint.weights_checksum(model)
    checksums = collective.gather(checksum) if isinstance(collective, RankMinimum) else [checksum]
    is_replicated = isinstance(pool, MLATokenToKVPool)
    n_kv_heads = None if is_replicated else ctx.model_config.get_total_num_kv_heads()
    parts = fingerprint.parts_of(
        model,
        ctx.model_config,
        ctx.server_args,
        pool,
        # What lies on disk is what must not be misread: host pages end with this process.
        formats.disk,
        weights=fingerprint.weights_of_all(checksums),
        shard=fingerprint.kv_shard(ctx.tp_rank, ctx.tp_size, n_kv_heads),
        release=sglang_release,
    )
    namespace = fingerprint.namespace_of(parts)
    logger.info(
        "Tiered KV: named the weights in %.2f s; the namespace is %s, of %s.",
        time.perf_counter() - started,
        namespace.hex()[:8],
        fingerprint.described(parts),
    )
    if store is None:
        return namespace, ()
    reason = fingerprint.beyond_names(ctx.model_config)
    if reason is not None:
        logger.warning("Tiered KV: nothing is kept on disk: %s.", reason)
        return namespace, ()
    description = f"{ctx.server_args.model_path} {pool.dtype} page {formats.disk.page_size}"
    if formats.disk_layout is not None and formats.disk.is_lossy:
        description += f" as {formats.disk_layout.format}"
    stored = store.namespace(namespace, formats.disk.page_bytes, description)
    return namespace, (LocalStore(formats.on_disk(stored), formats.disk),)


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
