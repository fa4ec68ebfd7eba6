"""The disk tier of one shard, as the options say."""

from __future__ import annotations

from pathlib import Path

from tiered_kv.core.config import TieredKVConfig
from tiered_kv.tiers.disk.encryption import read_key_file
from tiered_kv.tiers.disk.io_path import IoMode
from tiered_kv.tiers.disk.shards import ShardOpener
from tiered_kv.tiers.disk.store import Access, DiskStore
from tiered_kv.tiers.disk.tier import DiskTier
from tiered_kv.tiers.kv_shard import KVShard
from tiered_kv.tiers.transfer import Collective


def open_disk(
    config: TieredKVConfig, shard: KVShard, collective: Collective, server: int
) -> DiskTier | None:
    """The shard's part of the disk tier, or None on a rank for which another reads and writes it.

    server: what this server's processes on this machine have in common, and no other server. Every
    rank must make the call. Raises DiskTierError for misuse; a disk at fault is not.
    """
    disk = config.disk
    if disk.directory is None:
        return None
    assert disk.size_bytes is not None, "resolved by ServerArgs"
    capacity_bytes = disk.size_bytes // shard.n_stores_here
    key = None if disk.key_file is None else read_key_file(disk.key_file)

    def open_store(path: Path, access: Access) -> DiskStore:
        return DiskStore.open(
            path,
            capacity_bytes=capacity_bytes,
            io_threads=disk.io_threads,
            io_mode=IoMode(disk.io_mode),
            key=key,
            access=access,
        )

    # On several machines each was given another.
    (server,) = collective.minimum([server])
    if not shard.is_first:
        return None
    opener = ShardOpener(
        disk.directory,
        shard.store,
        shard.n_stores,
        f"{server:x}",
        open_store,
        afresh=disk.clear_on_start,
    )
    return DiskTier.open(opener, str(opener.path), capacity_bytes)
