"""Fixtures of the disk tier's tests; plain builders are in `disk_builders`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tiered_kv.tiers.disk.io_path import IoMode
from tiered_kv.tiers.disk.store import DiskStore

# Test modules are imported by path (importlib mode), so their neighbours need this to be found.
sys.path.insert(0, str(Path(__file__).parent))

from disk_builders import MIB


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
