"""What the server says of its tiers at its start."""

from __future__ import annotations

import logging

from tiered_kv.plugin.cache.formats import TierFormats
from tiered_kv.tiers.disk.tier import DiskTier
from tiered_kv.tiers.host import HostPool
from tiered_kv.tiers.kv_shard import KVShard

logger = logging.getLogger(__name__)


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


def log_sizes(host: HostPool, device_tokens: int, store: DiskTier | None, shard: KVShard) -> None:
    page_format = host.page_format
    disk = "off" if shard.is_first else f"as rank {shard.holders[0]}"
    if store is not None:
        stats = store.stats()
        disk = f"{stats.capacity / 1e9:.2f} GB, {stats.pages} pages stored"
    logger.info(
        "Tiered KV: pages of %d tokens, %.1f KiB; device %d tokens, host %d tokens (%.2f GB%s), "
        "disk %s.",
        page_format.page_size,
        page_format.page_bytes / 1024,
        device_tokens,
        host.n_pages * page_format.page_size,
        host.pages.nbytes / 1e9,
        f", shared by ranks {', '.join(map(str, shard.holders))}" if host.is_shared else "",
        disk,
    )
