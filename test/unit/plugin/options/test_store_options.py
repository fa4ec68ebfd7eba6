"""The options of the shared store: what they accept, what belongs together, and the key."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tiered_kv.core.config import StoreConfig
from tiered_kv.core.errors import ConfigError, DiskTierError
from tiered_kv.plugin.cache.store import open_store
from tiered_kv.plugin.options.store import KEY_VARIABLE, StoreArgs
from tiered_kv.tiers.host import HostPool
from tiered_kv.tiers.kv_shard import KVShard
from tiered_kv.tiers.page_format import PageFormat
from tiered_kv.tiers.replicas import StoreOfAnother
from tiered_kv.tiers.shared.object_store import ObjectStore

PAGE = PageFormat.of_buffers(16, (0, 0), (64, 64))
KEY = "ab" * 32
ADDRESS = "valkey://127.0.0.1:1?drain=9s"


@pytest.fixture(autouse=True)
def no_key_around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_text(KEY)
    path.chmod(0o600)
    return path


@pytest.fixture
def host() -> HostPool:
    return HostPool(PAGE, 8 * PAGE.slot_bytes)


@dataclasses.dataclass(kw_only=True)
class Given(StoreArgs):
    """The options alone, with a constructor; on a server SGLang's class brings one for all."""


def at(address: str | None, **options: Any) -> StoreConfig:
    return Given(
        tiered_kv_store=address,
        **{f"tiered_kv_store_{name}": value for name, value in options.items()},
    ).store_config()


def test_without_one_there_is_none(host: HostPool) -> None:
    for address in (None, "", "none", "NONE"):
        config = at(address)
        assert config == StoreConfig()
        assert open_store(config, KVShard.alone(0, 1), host, PAGE.page_bytes) is None


@pytest.mark.parametrize("option", [{"write": "all"}, {"encrypt": True}, {"key_file": "/k"}])
def test_what_belongs_to_a_store_is_refused_without_one(option: dict[str, Any]) -> None:
    (name,) = option
    flag = f"--tiered-kv-store-{name.replace('_', '-')}"
    with pytest.raises(ConfigError, match=rf"^{flag} has no effect without --tiered-kv-store;"):
        at(None, **option)


def test_what_is_written(key_file: Path) -> None:
    assert at(ADDRESS).writes == "value"
    assert at(ADDRESS, write="ALL").writes == "all"
    with pytest.raises(ConfigError, match="--tiered-kv-store-write must be one of value, all"):
        at(ADDRESS, write="some")


def test_encryption_needs_a_key(key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="--tiered-kv-store-encrypt needs a key"):
        at(ADDRESS, encrypt=True)
    assert at(ADDRESS, encrypt=True, key_file=str(key_file)).encrypts
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    assert at(ADDRESS, encrypt=True).encrypts


def test_the_key_of_a_file_or_of_the_environment(
    key_file: Path, host: HostPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = KVShard.alone(0, 1)

    def key_of(config: StoreConfig) -> bytes:
        store = open_store(config, alone, host, PAGE.page_bytes)
        assert store is not None
        store.close()
        return store.secrets.key

    assert key_of(at(ADDRESS)) == b""
    assert key_of(at(ADDRESS, key_file=str(key_file))) == bytes.fromhex(KEY)
    monkeypatch.setenv(KEY_VARIABLE, f" {KEY}\n")
    assert key_of(at(ADDRESS)) == bytes.fromhex(KEY)
    for wrong in ("secret", KEY[:-2]):
        monkeypatch.setenv(KEY_VARIABLE, wrong)
        with pytest.raises(ConfigError, match=f"{KEY_VARIABLE} holds no key"):
            key_of(at(ADDRESS))
    key_file.chmod(0o644)
    with pytest.raises(DiskTierError, match="may be used by others"):
        key_of(at(ADDRESS, key_file=str(key_file)))


def test_one_rank_of_those_with_the_same_pages_reads_and_writes(host: HostPool) -> None:
    shard = KVShard(1, 2, 0, 1, (0, 1), 0, 1, 1)
    store = open_store(at(ADDRESS), shard, host, PAGE.page_bytes)
    assert store is not None
    assert isinstance(store.pages(b"n" * 32, PAGE), StoreOfAnother)
    assert store.drain_s == 9.0
    first = open_store(at(ADDRESS), KVShard(0, 2, 0, 1, (0, 1), 0, 1, 1), host, PAGE.page_bytes)
    assert first is not None
    pages = first.pages(b"n" * 32, PAGE)
    assert isinstance(pages, ObjectStore)
    assert pages.traits == store.pages(b"n" * 32, PAGE).traits
    # Nobody listens there: a miss, and no error.
    slot = memoryview(np.zeros(PAGE.slot_bytes, dtype=np.uint8))
    assert (pages.lookup([b"p" * 32]), pages.get([b"p" * 32], [slot])) == (0, 0)
    first.close()


@pytest.mark.parametrize(
    "backend", ['hicache:no_such{"a": 1}', 'hicache:dynamic{"backend_name": "x"}', "hicache:hf3fs"]
)
def test_a_backend_that_sglang_cannot_make_is_refused(host: HostPool, backend: str) -> None:
    with pytest.raises(ConfigError, match=r"^--tiered-kv-store hicache:\w+ cannot be used"):
        open_store(at(backend), KVShard.alone(0, 1), host, PAGE.page_bytes)


def test_a_password_is_taken_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from tiered_kv.tiers.shared.address import PASSWORD_VARIABLE, parse_address
    from tiered_kv.tiers.shared.valkey import ValkeyBlobs

    monkeypatch.setitem(os.environ, PASSWORD_VARIABLE, "hush")
    blobs = ValkeyBlobs(parse_address("s", "valkeys://me@kv"), 1.0)
    settings = blobs._client.connection_pool.connection_kwargs
    assert (settings["username"], settings["password"]) == ("me", "hush")
    assert "hush" not in blobs.name
