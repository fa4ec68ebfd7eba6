"""Models some of whose layers look back a window only: what of them is kept apart, and how."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from tiered_kv.core.config import TieredKVConfig
from tiered_kv.core.errors import ConfigError
from tiered_kv.core.model_kv import share_apart
from tiered_kv.forest.key import namespace_hash
from tiered_kv.memory.windows import pages_back
from tiered_kv.plugin.cache.device_copier import make_copier
from tiered_kv.plugin.cache.device_pool import (
    DeviceBuffers,
    buffers_of,
    kv_pool_of,
    split_layers,
)
from tiered_kv.plugin.cache.formats import TierFormats, tier_formats
from tiered_kv.plugin.cache.window_cache import WindowPrefixCache
from tiered_kv.plugin.options import decode
from tiered_kv.plugin.upstream.current import arguments
from tiered_kv.tiers.disk.tier import DiskTier
from tiered_kv.tiers.host import MIN_HOST_PAGES, HostPool
from tiered_kv.tiers.layer_gate import LayerGate
from tiered_kv.tiers.pinned_memory import register_for_dma
from tiered_kv.tiers.windows import WindowPages, WindowRows

if TYPE_CHECKING:
    from sglang.srt.mem_cache.registry import TreeCacheBuildContext

    from tiered_kv.plugin.cache.parts import CacheParts

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WindowLayers:
    """layers: which, counted from the pool's first; rest, apart: the pool's buffers without and of
    them. n_back: pages that they look back. share: of the host's bytes, what is for them."""

    layers: tuple[int, ...]
    rest: DeviceBuffers
    apart: DeviceBuffers
    n_back: int
    share: float


def window_layers(ctx: TreeCacheBuildContext) -> WindowLayers | None:
    """None if the model has none, or if they are kept like all others."""
    pool = kv_pool_of(ctx.params.token_to_kv_pool_allocator.get_kvcache())
    looks_back = layers_that_look_back(ctx.tp_worker.model_runner.model)
    if not looks_back or type(pool) is not MHATokenToKVPool:
        return None
    reason = _why_whole(ctx)
    if reason is not None:
        logger.info(
            "Tiered KV: layers with a window keep all of their KV in all tiers: %s.", reason
        )
        return None
    device = buffers_of(pool)
    apart = {layer - pool.start_layer: window for layer, window in looks_back.items()}
    if len(apart) == len(set(device.layers)):
        return None
    rest, theirs = split_layers(device, apart)
    page_size = ctx.params.page_size
    n_back = pages_back(max(apart.values()), page_size)
    chunk = arguments.resolved(ctx.server_args).chunked_prefill_size
    longest = ctx.model_config.context_len
    weight = share_apart(n_back * page_size, chunk if chunk and chunk > 0 else longest)
    weight *= theirs.n_bytes
    share = weight / (weight + rest.n_bytes)
    return WindowLayers(tuple(sorted(apart)), rest, theirs, n_back, share)


def layers_that_look_back(model: torch.nn.Module) -> dict[int, int]:
    """The layers that read no KV but that of a window before each token, and how far they look."""
    found: dict[int, int | None] = {}
    for module in model.modules():
        if isinstance(module, RadixAttention):
            layer = module.layer_id
            window: int | None = module.sliding_window_size
            if window is None or window <= 0 or found.get(layer, window) is None:
                found[layer] = None
            else:
                found[layer] = max(window, found.get(layer) or 0)
    return {layer: window for layer, window in found.items() if window is not None}


def _why_whole(ctx: TreeCacheBuildContext) -> str | None:
    """What this server has that windows apart do not go with; or None."""
    args = ctx.server_args
    config: TieredKVConfig = args.to_config()
    reasons = {
        "with several ranks, which would have to agree on them": ctx.tp_size > 1,
        "with --pp-size above 1": ctx.params.pp_size > 1,
        "with several replicas": args.dp_size > 1,
        "with a shared store": config.store.address is not None,
        "where pages take fewer bytes below the device": not (
            config.host.page_format == config.disk_page_format == "raw"
        ),
        f"with {decode.OPTION}": args.tiered_kv_iteration_policy != decode.EVERYONE,
        "with --speculative-algorithm": args.speculative_algorithm is not None,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


class OtherLayersGate:
    """Layers wait by their number in the pool; loads count those without a window."""

    def __init__(self, gate: LayerGate, windows: WindowLayers, n_layers: int) -> None:
        self._gate = gate
        others = [layer for layer in range(n_layers) if layer not in windows.layers]
        self._places = {layer: place for place, layer in enumerate(others)}

    def wait_until(self, layer: int) -> None:
        place = self._places.get(layer)
        if place is not None:
            self._gate.wait_until(place)


def build_windows(
    ctx: TreeCacheBuildContext, parts: CacheParts, windows: WindowLayers, *, is_named: bool
) -> WindowPrefixCache:
    """is_named: whether KV of this model has a name that outlives the server.

    Raises ConfigError or DiskTierError if there is no room for what is kept apart.
    """
    params, context = ctx.params, parts.hierarchy.context
    config: TieredKVConfig = ctx.server_args.to_config()
    formats = tier_formats(config, windows.apart)
    on_cpu = windows.apart.buffers[0].device.type == "cpu"
    n_bytes = int(context.host.pages.nbytes * windows.share / (1 - windows.share))
    host = _open_host(formats, n_bytes, windows, pins=not on_cpu)
    copier = make_copier(formats, windows.apart, host, ctx.server_args.tiered_kv_copy_path)
    rows = WindowRows(
        windows.apart.buffers,
        windows.n_back,
        nullcontext if on_cpu else _on_stream(ctx.tp_worker.model_runner.forward_stream),
    )
    disk = parts.disk_store if is_named else None
    store = None if disk is None else disk_pages(disk, formats, windows)
    cache = WindowPrefixCache(params, parts, WindowPages(context, rows, copier, host.pages, store))
    pool = params.token_to_kv_pool_allocator.get_kvcache()
    gate = OtherLayersGate(parts.hierarchy.load_back.gate, windows, pool.layer_num)
    pool.register_layer_transfer_counter(gate)
    logger.info(
        "Tiered KV: %d layers look back %d pages; the host keeps %d pages of them apart, %.1f KiB "
        "each.",
        len(windows.layers),
        windows.n_back,
        host.n_pages,
        formats.host.page_bytes / 1024,
    )
    return cache


def _open_host(
    formats: TierFormats, n_bytes: int, windows: WindowLayers, *, pins: bool
) -> HostPool:
    least = max(MIN_HOST_PAGES, 2 * windows.n_back) * formats.host.slot_bytes
    if n_bytes < least:
        raise ConfigError(
            f"the host tier has {n_bytes} bytes for layers with a window, and needs {least} for "
            f"two windows; raise --tiered-kv-host-size to {int(least / windows.share) + 1} bytes "
            "or more"
        )
    return HostPool(formats.host, n_bytes, register_for_dma if pins else None)


def _on_stream(stream: Any) -> Callable[[], AbstractContextManager[object]]:
    return lambda: torch.cuda.stream(stream)


def disk_pages(disk: DiskTier, formats: TierFormats, windows: WindowLayers) -> Any:
    """Where they are kept on disk: a page's name says of which weights and tokens."""
    name = namespace_hash("windows", formats.disk.fingerprint().hex(), str(windows.layers))
    return disk.namespace(name, formats.disk.page_bytes, "layers with a window")
