"""The host pool of one rank, or of all that have the same shard, as the options say."""

from __future__ import annotations

import logging
import mmap
from collections.abc import Callable

from tiered_kv.core.config import TieredKVConfig
from tiered_kv.plugin.cache.parts import RankMinimum
from tiered_kv.tiers.host import MIN_HOST_PAGES, HostPool
from tiered_kv.tiers.host_size import host_size
from tiered_kv.tiers.kv_shard import KVShard
from tiered_kv.tiers.memory_limits import available_bytes
from tiered_kv.tiers.page_format import PageFormat
from tiered_kv.tiers.pinned_memory import register_for_dma
from tiered_kv.tiers.shared_memory import share_memory
from tiered_kv.tiers.transfer import Collective

logger = logging.getLogger(__name__)


def open_host(
    page_format: PageFormat, rank_bytes: int, shard: KVShard, collective: Collective, *, pins: bool
) -> tuple[HostPool, KVShard]:
    """The pool, and the shard as it is kept: apart if ranks cannot share memory.

    rank_bytes: what each rank may take; those with the same shard put it together. pins: whether a
    GPU is to reach it. Every rank must make the call. Raises ConfigError.
    """
    shared = None
    if len(shard.holders) > 1:  # on every rank alike
        shared = _shared_by(shard, rank_bytes * len(shard.holders), collective)
        shard = shard if shared is not None else shard.apart()
    register: Callable[[int, int], None] | None = register_for_dma if pins else None
    size_bytes = rank_bytes * len(shard.holders)
    return HostPool(page_format, size_bytes, register, shared), shard


def _shared_by(shard: KVShard, n_bytes: int, collective: Collective) -> mmap.mmap | None:
    """The memory that those with the same shard have in common, None if each has its own."""
    if isinstance(collective, RankMinimum):
        shared = share_memory(n_bytes, shard.rank, shard.holders[0], collective)
        if shared is not None:
            return shared
    logger.warning(
        "Tiered KV: ranks %s have the same KV, but can have no memory in common here (memfd_create "
        "or another rank's /proc/PID/fd is forbidden): each keeps a copy of its own.",
        ", ".join(map(str, shard.holders)),
    )
    return None


def host_bytes(
    config: TieredKVConfig,
    device_bytes: int,
    page_format: PageFormat,
    n_ranks: int,
    collective: Collective,
    first_word: Callable[[int], int] = lambda value: value,
) -> int:
    """The size of this rank's host pool; n_ranks: on this machine.

    first_word: what the first to ask gave, of ranks of this machine that the collective lacks.

    Every rank must call it, and gets the same. Raises ConfigError if the machine does not have what
    was asked for by its size.
    """
    free = available_bytes()
    # Before any rank takes something: else the last to look would see what the others left.
    (agreed,) = collective.minimum([-1 if free is None else free])
    agreed = first_word(agreed)
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
