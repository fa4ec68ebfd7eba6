"""The disk tier that the options describe, opened by each rank of a server."""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support_tiers.doubles import BarrierMinimum
from tiered_kv.core.config import DiskConfig, TieredKVConfig
from tiered_kv.core.errors import DiskTierError
from tiered_kv.plugin.cache.disk import open_disk
from tiered_kv.tiers.disk.tier import DiskTier
from tiered_kv.tiers.kv_shard import KVShard, kv_shard
from tiered_kv.tiers.transfer import SingleRank

Open = Callable[..., DiskTier]

SIZE_BYTES = 64 << 20
ALONE = KVShard.alone(0, 1)


@pytest.fixture
def open_one(tmp_path: Path) -> Iterator[Open]:
    tiers: list[DiskTier] = []

    def open_it(
        shard: KVShard = ALONE,
        collective: object = None,
        server: int | None = None,
        **options: object,
    ) -> DiskTier:
        disk = DiskConfig(directory=tmp_path / "kv", size_bytes=SIZE_BYTES, **options)  # type: ignore[arg-type]
        server = secrets.randbits(62) if server is None else server
        tier = open_disk(TieredKVConfig(disk=disk), shard, collective or SingleRank(), server)  # type: ignore[arg-type]
        assert tier is not None
        tiers.append(tier)
        return tier

    yield open_it
    for tier in tiers:
        tier.close(10.0)


def store_a_page(tier: DiskTier) -> None:
    page = memoryview(bytes(4096))
    assert tier.namespace(bytes(32), 4096).write_pages([bytes(32)], [page]) == 1


def test_no_directory_no_tier() -> None:
    config = TieredKVConfig(disk=DiskConfig(directory=None))
    assert open_disk(config, ALONE, SingleRank(), 1) is None


def test_the_ranks_of_a_server_share_the_directory(open_one: Open, tmp_path: Path) -> None:
    barrier = BarrierMinimum(2)
    tiers: dict[int, DiskTier] = {}

    def open_rank(rank: int) -> None:
        tiers[rank] = open_one(KVShard.alone(rank, 2), barrier.rank(rank))

    threads = [threading.Thread(target=open_rank, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in range(2):
        assert not tiers[rank].stats().degraded
        assert tiers[rank].capacity_bytes == SIZE_BYTES // 2
        store_a_page(tiers[rank])
    assert (tmp_path / "kv" / "shard-1-of-2" / "FORMAT").exists()


def test_ranks_with_the_same_kv_have_one_store_of_the_whole_size(
    open_one: Open, tmp_path: Path
) -> None:
    config = TieredKVConfig(disk=DiskConfig(directory=tmp_path / "kv", size_bytes=SIZE_BYTES))
    barrier = BarrierMinimum(4)
    opened: dict[int, DiskTier | None] = {}

    def open_rank(rank: int) -> None:
        opened[rank] = open_disk(config, kv_shard(rank, 4, None), barrier.rank(rank), 1 + rank)

    threads = [threading.Thread(target=open_rank, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first = opened.pop(0)
    assert first is not None
    assert list(opened.values()) == [None] * 3
    assert first.capacity_bytes == SIZE_BYTES
    store_a_page(first)
    first.close(10.0)
    # A server of another size finds the same shard where it was: it is the same KV.
    again = open_one(kv_shard(0, 1, None))
    assert again.stats().pages == 1
    assert [path.name for path in (tmp_path / "kv").iterdir() if path.is_dir()] == ["shard-0-of-1"]


def test_replicas_share_the_directory_and_the_size(open_one: Open, tmp_path: Path) -> None:
    """They have no group in common; the number of their server tells that they are one."""
    tiers = [open_one(ALONE.of_replica(index, 2), server=5) for index in range(2)]
    for tier in tiers:
        assert tier.capacity_bytes == SIZE_BYTES // 2
        store_a_page(tier)
        assert tier.stats().pages == 1
    names = sorted(path.name for path in (tmp_path / "kv").iterdir() if path.is_dir())
    assert names == ["shard-0-of-2", "shard-1-of-2"]
    with pytest.raises(DiskTierError, match="is in use by process"):
        open_one(ALONE.of_replica(0, 2), server=6)


def test_another_server_is_refused(open_one: Open) -> None:
    open_one()
    with pytest.raises(DiskTierError, match="is in use by process"):
        open_one()


def test_a_key_is_changed_by_clearing(open_one: Open, tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    key_file.write_bytes(bytes(range(32)))
    key_file.chmod(0o600)
    tier = open_one()
    store_a_page(tier)
    tier.close(10.0)
    with pytest.raises(DiskTierError, match="not encrypted but a key was given"):
        open_one(key_file=key_file)
    tier = open_one(key_file=key_file, clear_on_start=True)
    assert tier.stats().encrypted
    assert tier.stats().pages == 0
    store_a_page(tier)


def test_another_format_is_cleared_away(open_one: Open, tmp_path: Path) -> None:
    shard = tmp_path / "kv" / "shard-0-of-1"
    shard.mkdir(parents=True)
    (shard / "FORMAT").write_text(json.dumps({"format": "tiered-kv-disk", "version": 99}))
    tier = open_one()
    assert tier.stats().degraded
    tier.close(10.0)
    tier = open_one(clear_on_start=True)
    assert not tier.stats().degraded
    store_a_page(tier)
