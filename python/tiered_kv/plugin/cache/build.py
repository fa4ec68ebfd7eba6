"""The composition root: from upstream's build context to a working prefix cache."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sglang.version import __version__ as sglang_release

from tiered_kv.core.config import TieredKVConfig
from tiered_kv.core.errors import ConfigError
from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.memory.manager import MemoryManager
from tiered_kv.plugin.cache import adapters, drafts, fingerprint, weight_updates
from tiered_kv.plugin.cache.build_windows import WindowLayers, build_windows, window_layers
from tiered_kv.plugin.cache.costs import build_cost_model
from tiered_kv.plugin.cache.device_copier import make_copier
from tiered_kv.plugin.cache.device_pool import (
    DeviceBuffers,
    EngineAllocator,
    buffers_of,
    kv_pool_of,
)
from tiered_kv.plugin.cache.disk import open_disk
from tiered_kv.plugin.cache.events import KvEvents
from tiered_kv.plugin.cache.formats import TierFormats, tier_formats
from tiered_kv.plugin.cache.host import host_bytes, open_host
from tiered_kv.plugin.cache.metrics_adapter import MetricsRecorder, PrometheusRecorder
from tiered_kv.plugin.cache.parts import CacheParts, HostReport, RankMinimum
from tiered_kv.plugin.cache.pass_streams import launched_so_far, pass_holder
from tiered_kv.plugin.cache.replicas import Replica, replica_of
from tiered_kv.plugin.cache.residency_log import ResidencyLog
from tiered_kv.plugin.cache.shards import shard_of
from tiered_kv.plugin.cache.sizes_log import log_formats, log_sizes
from tiered_kv.plugin.cache.stages import NoMeeting, Stage, layers_of, stage_of
from tiered_kv.plugin.cache.store import SharedStore, open_store
from tiered_kv.plugin.cache.watched import Watched
from tiered_kv.plugin.options import dp_attention
from tiered_kv.plugin.options.overlap import budget_share, rank_trace_file
from tiered_kv.plugin.passes.pass_log import Pass, PassLog, draw_passes, pace_by_decodes
from tiered_kv.plugin.passes.step_times import StepTimes
from tiered_kv.plugin.upstream.current import arguments, cache_contract, hardware
from tiered_kv.scheduler.calibration import Calibrator
from tiered_kv.scheduler.cost_model import CostModel, PlacementCosts
from tiered_kv.tiers.cold.local_pages import LocalStore
from tiered_kv.tiers.context import TierContext
from tiered_kv.tiers.device import PageCopier
from tiered_kv.tiers.disk.tier import DiskTier
from tiered_kv.tiers.hierarchy import KVHierarchy
from tiered_kv.tiers.host import HostPool
from tiered_kv.tiers.interference import InterferenceBudget
from tiered_kv.tiers.kv_shard import KVShard
from tiered_kv.tiers.pacing import WriteBackPacer
from tiered_kv.tiers.page_store import PageStore, StoreTraits
from tiered_kv.tiers.recurrent import STATES_SHARE
from tiered_kv.tiers.replicas import PartCopier, StoreOfAnother
from tiered_kv.tiers.streams import Point
from tiered_kv.tiers.timeline import TimelineFile
from tiered_kv.tiers.transfer import Collective, SingleRank

if TYPE_CHECKING:
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.registry import TreeCacheBuildContext

    from tiered_kv.plugin.cache.prefix_cache import TieredPrefixCache

logger = logging.getLogger(__name__)


def build_tree_cache(ctx: TreeCacheBuildContext) -> TieredPrefixCache:
    """Raises ConfigError or DiskTierError, one sentence each, if a tier cannot be set up."""
    from tiered_kv.plugin.cache.prefix_cache import TieredPrefixCache

    drafts.check_runner(ctx)
    draft = drafts.runner_of(ctx)
    if draft is not None:
        ctx.params.is_eagle = True
    windows = window_layers(ctx)
    parts = build_parts(ctx, windows)
    gate = parts.hierarchy.load_back.gate
    pool = ctx.params.token_to_kv_pool_allocator.get_kvcache()
    cache: TieredPrefixCache
    if ctx.is_hybrid_ssm:
        from tiered_kv.plugin.cache.build_hybrid import build_hybrid

        cache = build_hybrid(ctx, parts, is_named=are_named(ctx, "on disk"))
    elif windows is not None:
        cache = build_windows(ctx, parts, windows, is_named=are_named(ctx, "on disk"))
    else:
        cache = TieredPrefixCache(ctx.params, parts)
        pool.register_layer_transfer_counter(gate)
    if draft is not None:
        drafts.register_gate(gate, draft.token_to_kv_pool)
    ctx.tp_worker.register_hicache_layer_transfer_counter(gate)
    weight_updates.track(cache, hardware.weights_of(ctx.tp_worker))
    lora_manager = getattr(ctx.tp_worker.model_runner, "lora_manager", None)
    adapters.track(adapters.AdapterNames(lora_manager, make_collective(ctx)))
    return cache


def build_parts(ctx: TreeCacheBuildContext, windows: WindowLayers | None = None) -> CacheParts:
    config: TieredKVConfig = ctx.server_args.to_config()
    params, allocator = ctx.params, ctx.params.token_to_kv_pool_allocator
    pool = kv_pool_of(allocator.get_kvcache())
    device = device_buffers(ctx) if windows is None else windows.rest
    formats = tier_formats(config, device)
    on_cpu = device.buffers[0].device.type == "cpu"

    args, collective, replica = ctx.server_args, make_collective(ctx), replica_of(ctx)
    stage = stage_of(ctx)
    host, shard = host_of(ctx, formats, collective, replica, windows, stage)
    copier = make_copier(formats, device, host, args.tiered_kv_copy_path)
    if host.is_shared:
        copier = PartCopier(copier, shard.place, len(shard.holders))
    timeline = open_timeline(args, replica.process, copier)
    disk = open_disk(config, shard, stage.everyone if stage else collective, replica.server)
    has_disk = config.disk.directory is not None
    store = open_store(config.store, shard, host, formats.disk.page_bytes)

    def name_weights() -> tuple[bytes, tuple[PageStore, ...]]:
        namespace = name_namespace(ctx, pool, formats, shard, windows, stage)
        on_disk = disk_stores(ctx, namespace, formats, disk) if has_disk else ()
        return namespace, on_disk + shared_stores(ctx, namespace, formats, store)

    namespace, stores = name_weights()
    events = make_events(params)
    residency = ResidencyLog(events)
    metrics = make_metrics(ctx, replica)
    forest = Forest(params.page_size, tiers=tiers_in_use(store))
    cost_model = None
    if stage is None:  # what a stage learns it learns from its own layers, and it would decide
        cost_model = build_cost_model(ctx, pool, formats.host, replica.n_ranks)
    costs = None if cost_model is None else placement_costs(cost_model, formats)
    runner = ctx.tp_worker.model_runner
    context = TierContext(
        forest=forest,
        manager=MemoryManager(forest, config.memory, costs),
        copier=copier,
        allocator=EngineAllocator(allocator),
        host=host,
        stores=stores,
        names_pairs=ctx.params.is_eagle,
        collective=collective if stage is None else NoMeeting(),
        stages=None if stage is None else stage.meeting,
        listener=residency,
        observer=metrics,
        calibrator=None if cost_model is None else Calibrator(cost_model),
        order_after=tuple if on_cpu else lambda: launched_so_far(runner.forward_stream),
        hold_passes=None if on_cpu else hold_passes(ctx),
        timeline=timeline,
        pacer=make_pacer(budget_share(args, on_cpu=on_cpu)),
    )
    log_sizes(host, pool.size, disk, shard)
    log_formats(formats)
    hierarchy = KVHierarchy(context, namespace)
    return CacheParts(
        hierarchy=hierarchy,
        disk_store=disk,
        has_disk=has_disk,
        store=store,
        events=events,
        metrics=metrics,
        host_report=HostReport(host),
        name_weights=name_weights if may_name_again(ctx) else None,
        step_times=StepTimes(hierarchy, synchronous=on_cpu),
        pass_log=make_pass_log(context, cost_model, synchronous=on_cpu),
        residency=residency,
        cost_model=cost_model,
        watched=make_watched(args, replica.process, forest),
    )


def device_buffers(ctx: TreeCacheBuildContext) -> DeviceBuffers:
    """All that has rows at the slots of the model's KV pool."""
    device = buffers_of(kv_pool_of(ctx.params.token_to_kv_pool_allocator.get_kvcache()))
    draft = drafts.runner_of(ctx)
    return device if draft is None else drafts.with_draft(device, draft.token_to_kv_pool)


def make_events(params: CacheInitParams) -> KvEvents:
    """What routers are told, if anybody asked for it."""
    labels = cache_contract.block_labels(params)
    return KvEvents(params.page_size, params.enable_kv_cache_events, labels)


def host_of(
    ctx: TreeCacheBuildContext,
    formats: TierFormats,
    collective: Collective,
    replica: Replica,
    windows: WindowLayers | None,
    stage: Stage | None,
) -> tuple[HostPool, KVShard]:
    """This rank's host pool, and the shard that is kept there and below. Raises ConfigError."""
    # The ranks of one machine: they are spread evenly.
    n_machines = arguments.resolved(ctx.server_args).nnodes
    n_ranks = max(1, replica.n_ranks * replica.n_replicas // n_machines)
    config: TieredKVConfig = ctx.server_args.to_config()
    pool = kv_pool_of(ctx.params.token_to_kv_pool_allocator.get_kvcache())
    device = device_buffers(ctx)
    everyone, first_word = collective, replica.first_word
    if stage is not None:
        everyone, first_word = stage.everyone, lambda value: value
    rank_bytes = host_bytes(config, device.n_bytes, formats.host, n_ranks, everyone, first_word)
    apart = STATES_SHARE if ctx.is_hybrid_ssm else 0.0 if windows is None else windows.share
    rank_bytes -= int(rank_bytes * apart)
    if stage is not None:
        # As many pages as the stage with the most layers has room for: all have the same pages.
        (n_pages,) = everyone.minimum([rank_bytes // formats.host.slot_bytes])
        rank_bytes = n_pages * formats.host.slot_bytes
    shard = shard_of(ctx, pool, replica)
    pins = device.buffers[0].device.type != "cpu"
    host, shard = open_host(formats.host, rank_bytes, shard, collective, pins=pins)
    if stage is not None:
        least, negative_most = everyone.minimum([host.n_pages, -host.n_pages])
        if least != -negative_most:
            raise ConfigError(
                f"the stages of the pipeline have host tiers of {least} to {-negative_most} pages, "
                "as some of their ranks can share memory and others cannot; start them alike"
            )
    return host, shard.of_replica(replica.index, replica.n_replicas)


def hold_passes(ctx: TreeCacheBuildContext) -> Callable[[Point], None]:
    """Makes forward passes that are launched from now on wait for a point."""
    overlaps = not arguments.resolved(ctx.server_args).disable_overlap_schedule
    return pass_holder(ctx.tp_worker.model_runner.forward_stream, overlaps=overlaps)


def make_watched(server_args: Any, process: int, forest: Forest) -> Watched | None:
    """One rank of all answers who looks; what it keeps for that decides nothing."""
    is_watched = server_args.tiered_kv_view == "on" and process == 0
    return Watched(forest) if is_watched else None


def placement_costs(cost_model: CostModel, formats: TierFormats) -> PlacementCosts:
    return PlacementCosts(
        cost_model,
        bytes_per_token=formats.device.token_bytes,
        tier_bytes_per_token={
            Tier.HOST: formats.host.token_bytes,
            Tier.DISK: formats.disk.token_bytes,
            Tier.STORE: formats.disk.token_bytes,
        },
    )


def open_timeline(server_args: Any, process: int, copier: PageCopier) -> TimelineFile | None:
    """Raises ConfigError if the file cannot be written."""
    path = rank_trace_file(server_args, process)
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
    ctx: TreeCacheBuildContext,
    pool: Any,
    formats: TierFormats,
    shard: KVShard,
    windows: WindowLayers | None = None,
    stage: Stage | None = None,
) -> bytes:
    """The namespace of KV computed from now on.

    On several ranks all must call it at the same points.
    """
    started = time.perf_counter()
    model = ctx.tp_worker.model_runner.model
    checksum = fingerprint.weights_checksum(model)
    # All ranks, also those of DP attention that have other requests: KV depends on everybody's.
    has_others = isinstance(make_collective(ctx), RankMinimum)
    checksums = [checksum]
    if stage is not None:
        checksums = stage.everyone.gather(checksum)
    elif has_others:
        checksums = RankMinimum(ctx.tp_group.cpu_group).gather(checksum)
    parts = fingerprint.parts_of(
        model,
        ctx.model_config,
        ctx.server_args,
        pool,
        # What lies on disk is what must not be misread: host pages end with this process.
        formats.disk,
        weights=fingerprint.weights_of_all(checksums),
        shard=shard.name,
        release=sglang_release,
    )
    if ctx.is_hybrid_ssm:
        # KV is computed from states, which are rounded to what keeps them.
        from tiered_kv.plugin.cache.state_pool import described

        parts["recurrent state"] = described(ctx.params.req_to_token_pool.mamba_pool)
    if windows is not None:
        parts["layers apart"] = str(windows.layers)
    if stage is not None:
        parts["layers"] = layers_of(pool, stage)
    draft = drafts.runner_of(ctx)
    if draft is not None:
        parts["draft"] = drafts.name_of(ctx, draft)
    namespace = fingerprint.namespace_of(parts)
    logger.info(
        "Tiered KV: named the weights in %.2f s; the namespace is %s, of %s.",
        time.perf_counter() - started,
        namespace.hex()[:8],
        fingerprint.described(parts),
    )
    return namespace


def tiers_in_use(store: SharedStore | None) -> tuple[Tier, ...]:
    """Those that the forest keeps books of."""
    return tuple(tier for tier in Tier if tier is not Tier.STORE or store is not None)


def disk_stores(
    ctx: TreeCacheBuildContext, namespace: bytes, formats: TierFormats, disk: DiskTier | None
) -> tuple[PageStore, ...]:
    """Where pages with that name are kept on disk; disk: None if another rank has it."""
    if not are_named(ctx, "on disk"):
        return ()
    if disk is None:
        return (StoreOfAnother(StoreTraits(Tier.DISK, formats.disk)),)
    pool = kv_pool_of(ctx.params.token_to_kv_pool_allocator.get_kvcache())
    description = f"{ctx.server_args.model_path} {pool.dtype} page {formats.disk.page_size}"
    if formats.disk_layout is not None and formats.disk.is_lossy:
        description += f" as {formats.disk_layout.format}"
    stored = disk.namespace(namespace, formats.disk.page_bytes, description)
    return (LocalStore(formats.on_disk(stored), formats.disk),)


def shared_stores(
    ctx: TreeCacheBuildContext, namespace: bytes, formats: TierFormats, store: SharedStore | None
) -> tuple[PageStore, ...]:
    """Where pages with that name are shared with other servers, in the disk's format."""
    if store is None or not are_named(ctx, "in the store"):
        return ()
    return (formats.in_store(store.pages(namespace, formats.disk)),)


def are_named(ctx: TreeCacheBuildContext, where: str) -> bool:
    """Whether KV of this model has a name that outlives the server."""
    reason = fingerprint.beyond_names(ctx.model_config)
    if reason is not None:
        logger.warning("Tiered KV: nothing is kept %s: %s.", where, reason)
    return reason is None


def may_name_again(ctx: TreeCacheBuildContext) -> bool:
    """Whether weights that have changed can be named, when the next prompt comes.

    All ranks must name them at one point of their loops; those of DP attention have no such, nor
    have stages of a pipeline.
    """
    return ctx.params.pp_size == 1 and not dp_attention.is_on(arguments.resolved(ctx.server_args))


def make_collective(ctx: TreeCacheBuildContext) -> Collective:
    """Of the ranks that have the same requests."""
    group = ctx.params.tp_cache_group
    return SingleRank() if ctx.tp_size == 1 or group is None else RankMinimum(group)


def make_metrics(ctx: TreeCacheBuildContext, replica: Replica) -> MetricsRecorder:
    if not ctx.params.enable_metrics:
        return MetricsRecorder()
    outcome = arguments.resolved(ctx.server_args)
    served_name = outcome.served_model_name or outcome.model_path
    labels = {"model_name": served_name, "tp_rank": str(ctx.tp_rank)}
    if replica.is_one_of_many:  # as SGLang's own
        labels["dp_rank" if ctx.params.pp_size == 1 else "pp_rank"] = str(replica.index)
    return PrometheusRecorder(labels)
