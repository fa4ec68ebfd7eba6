"""Real stores, one of each for all tests here, empty for each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.stores import Mooncake, Process, valkey_server
from support.engines import engine_or_skip
from support_tiers.shared_blobs import SharedBlobs
from support_tiers.tier_rig import Rig, new_disk
from tiered_kv.tiers.shared.address import parse_address
from tiered_kv.tiers.shared.blobs import Blobs
from tiered_kv.tiers.shared.envelope import HEADER_BYTES

DEADLINE_S = 2.0
#: Of the pages in test_conformance.py.
HICACHE_BLOB_BYTES = HEADER_BYTES + 16 * 4 * 24


@pytest.fixture
def blobs() -> SharedBlobs:
    return SharedBlobs()


@pytest.fixture
def rig(make_rig: Callable[..., Rig], blobs: SharedBlobs) -> Rig:
    """A disk, and `blobs` below it."""
    return make_rig(64, 32, new_disk(), remote=blobs)


@pytest.fixture(scope="session")
def valkey_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    server = engine_or_skip(lambda: valkey_server(tmp_path_factory.mktemp("valkey")))
    with server:
        yield server


@pytest.fixture(scope="session")
def mooncake_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mooncake]:
    cluster = engine_or_skip(lambda: Mooncake(tmp_path_factory.mktemp("mooncake")))
    with cluster:
        yield cluster


@pytest.fixture
def valkey_blobs(valkey_process: Process) -> Iterator[Any]:
    from tiered_kv.tiers.shared.valkey import ValkeyBlobs

    address = parse_address("--tiered-kv-store", f"valkey://127.0.0.1:{valkey_process.port}")
    blobs = ValkeyBlobs(address, DEADLINE_S)
    blobs._client.flushall()
    yield blobs
    blobs.close()


@pytest.fixture(scope="session")
def mooncake_client(mooncake_cluster: Mooncake) -> Iterator[Any]:
    from tiered_kv.tiers.shared.mooncake import MooncakeBlobs

    address = parse_address("--tiered-kv-store", f"mooncake://{mooncake_cluster.address}")
    blobs = MooncakeBlobs(address, DEADLINE_S)
    blobs.connect()
    yield blobs
    blobs.close()


@pytest.fixture
def mooncake_blobs(mooncake_client: Any) -> Any:
    mooncake_client._store.remove_all(True)
    return mooncake_client


@pytest.fixture
def hicache_file_blobs(tmp_path: Path) -> Iterator[Any]:
    yield from hicache_blobs(f'hicache:file{{"path": "{tmp_path}"}}', tmp_path)


def hicache_blobs(text: str, folder: Path) -> Iterator[Any]:
    from sglang.srt.environ import envs

    from tiered_kv.plugin.cache.hicache import HiCacheBlobs

    with envs.SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR.override(str(folder)):
        blobs = HiCacheBlobs(parse_address("--tiered-kv-store", text), HICACHE_BLOB_BYTES)
    yield blobs
    blobs.close()


@pytest.fixture
def hicache_mooncake_blobs(mooncake_cluster: Mooncake, tmp_path: Path) -> Iterator[Any]:
    config = {"master_server_address": mooncake_cluster.address, "protocol": "tcp"}
    config |= {"metadata_server": "P2PHANDSHAKE", "global_segment_size": 0}
    config |= {"local_hostname": "127.0.0.1", "extra_backend_tag": tmp_path.name}
    yield from hicache_blobs(f"hicache:mooncake{json.dumps(config)}", tmp_path)


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> Callable[[str], Blobs]:
    """A client of a real store, empty, by the engine's name."""
    return lambda name: request.getfixturevalue(f"{name}_blobs")
