"""Fixtures of the disk tier's tests; plain builders are in `disk_builders`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tiered_kv.tiers.disk import shards as shards_module
from tiered_kv.tiers.disk import tier as tier_module
from tiered_kv.tiers.disk.io_ops import IoOps
from tiered_kv.tiers.disk.io_path import IoMode
from tiered_kv.tiers.disk.shards import ShardOpener, shard_path
from tiered_kv.tiers.disk.store import Access, DiskStore
from tiered_kv.tiers.disk.tier import DiskTier

# Test modules are imported by path (importlib mode), so their neighbours need this to be found.
sys.path.insert(0, str(Path(__file__).parent))

import disk_builders
from disk_builders import MIB, NAMESPACE, PAGE_BYTES, PATIENCE_S
from tier_builders import Disk, pages_of, write


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "disk"


@pytest.fixture(scope="session")
def has_direct_io(tmp_path_factory: pytest.TempPathFactory) -> bool:
    directory = tmp_path_factory.mktemp("probe")
    with DiskStore.open(directory, capacity_bytes=8 * MIB) as store:
        return store.stats().direct_io


@pytest.fixture(params=[IoMode.DIRECT, IoMode.BUFFERED])
def io_mode(request: pytest.FixtureRequest, has_direct_io: bool) -> IoMode:
    """Both paths; the direct one is skipped where the file system has none."""
    if request.param is IoMode.DIRECT and not has_direct_io:
        pytest.skip("no direct I/O on this file system")
    return IoMode(request.param)


@pytest.fixture
def open_store(directory: Path) -> Iterator[Callable[..., DiskStore]]:
    """Opens stores in `directory` and closes what the test left open."""
    stores: list[DiskStore] = []

    def open_one(**options: object) -> DiskStore:
        options.setdefault("capacity_bytes", 128 * MIB)
        store = DiskStore.open(directory, **options)  # type: ignore[arg-type]
        stores.append(store)
        return store

    yield open_one
    for store in stores:
        store.close()


@pytest.fixture
def written(open_store: Callable[..., DiskStore], directory: Path) -> Path:
    """A closed directory with pages 0..29, in slots 0..29 of its first segments."""
    store = open_store()
    disk_builders.write(store.namespace(NAMESPACE, PAGE_BYTES), range(30))
    store.close()
    return directory


@pytest.fixture
def _quick_tiers(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(tier_module, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(tier_module, "LONGEST_PAUSE_S", 0.05)
    monkeypatch.setattr(tier_module, "LOOK_S", 0.05)
    monkeypatch.setattr(shards_module, "JOIN_TIMEOUT_S", 0.3)
    caplog.set_level(logging.INFO, logger="tiered_kv")


@pytest.fixture
def open_tier(directory: Path, _quick_tiers: None) -> Iterator[Callable[..., DiskTier]]:
    """Opens tiers as the ranks of servers do; what is left open is closed."""
    tiers: list[DiskTier] = []

    def open_one(
        rank: int = 0,
        n_ranks: int = 1,
        *,
        server: str = "a",
        afresh: bool = False,
        key: bytes | None = None,
        io_ops: IoOps | None = None,
        timeout_s: float = PATIENCE_S,
    ) -> DiskTier:
        def open_store(path: Path, access: Access) -> DiskStore:
            return DiskStore.open(
                path, capacity_bytes=64 * MIB, key=key, io_ops=io_ops, access=access
            )

        opener = ShardOpener(directory, rank, n_ranks, server, open_store, afresh=afresh)
        tier = DiskTier.open(opener, str(opener.path), 64 * MIB, timeout_s)
        tiers.append(tier)
        return tier

    yield open_one
    for tier in tiers:
        tier.close(PATIENCE_S)


@pytest.fixture
def written_shard(directory: Path, open_tier: Callable[..., DiskTier]) -> Path:
    """The shard of a server that has stored 20 pages and stopped."""
    tier = open_tier()
    assert write(pages_of(tier), range(20)) == 20
    tier.close(PATIENCE_S)
    return shard_path(directory, 0, 1)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)
