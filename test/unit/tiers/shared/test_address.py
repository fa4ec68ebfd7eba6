"""What `--tiered-kv-store` may say."""

from __future__ import annotations

import pytest

from tiered_kv.core.errors import ConfigError
from tiered_kv.tiers.shared import address as address_module
from tiered_kv.tiers.shared.address import check_client, parse_address

OPTION = "--tiered-kv-store"


@pytest.mark.parametrize(
    ("text", "engine", "host", "port"),
    [
        ("valkey://kv:7000", "valkey", "kv", 7000),
        ("valkey://kv", "valkey", "kv", 6379),
        ("redis://10.0.0.1:6380/3", "valkey", "10.0.0.1", 6380),
        ("rediss://[::1]:1", "valkey", "::1", 1),
        ("mooncake://master", "mooncake", "master", 50051),
        (" mooncake://master:50052 ", "mooncake", "master", 50052),
    ],
)
def test_engines_and_where_they_are(text: str, engine: str, host: str, port: int) -> None:
    found = parse_address(OPTION, text)
    assert (found.engine, found.host, found.port) == (engine, host, port)


def test_what_else_an_address_says() -> None:
    found = parse_address(OPTION, "valkeys://me@kv/2?ttl=12h&timeout=250ms")
    assert (found.user, found.database, found.is_encrypted) == ("me", 2, True)
    assert found.parameters == {"ttl": 43200.0, "timeout": 0.25}
    found = parse_address(OPTION, "mooncake://m?replicas=2&soft_pin=30m&segment=4GB&protocol=rdma")
    assert found.parameters == {
        "replicas": 2,
        "soft_pin": 1800.0,
        "segment": 4 * 10**9,
        "protocol": "rdma",
    }
    assert found.name == "mooncake://m:50051"


def test_backends_of_sglang() -> None:
    found = parse_address(OPTION, 'hicache:nixl{"plugin": {"posix": {}}, "tiered_kv_drain": "9s"}')
    assert (found.engine, found.backend, found.name) == ("hicache", "nixl", "hicache:nixl")
    assert found.parameters == {"extra_config": {"plugin": {"posix": {}}}, "drain": 9.0}
    assert parse_address(OPTION, "hicache:file").parameters == {"extra_config": {}}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("memcached://kv", "write mooncake://MASTER:PORT"),
        ("valkey://", "write mooncake://MASTER:PORT"),
        ("kv:6379", "write mooncake://MASTER:PORT"),
        ("valkey://kv:port", "write mooncake://MASTER:PORT"),
        ("valkey://:secret@kv", "environment variable TIERED_KV_STORE_PASSWORD"),
        ("valkey://kv/db", "name a database by its number"),
        ("mooncake://m/2", "leave it out"),
        ("valkey://kv?replicas=2", "no parameter 'replicas' for valkey; it knows timeout"),
        ("mooncake://m?replicas=0", "wrong parameter replicas"),
        ("valkey://kv?ttl=soon", "wrong parameter ttl: 'soon' is not a time"),
        ("valkey://kv?timeout=0s", "wrong parameter timeout"),
        ("valkeys://kv?ca=/no/such.pem", "wrong parameter ca: '/no/such.pem' cannot be read"),
        (f"valkey://kv?ca={__file__}", "write valkeys://"),
        ("hicache:", "names no backend"),
        ("hicache:nixl{plugin", "no JSON"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=r"^--tiered-kv-store ") as error:
        parse_address(OPTION, text)
    assert sentence in str(error.value)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(("scheme", "extra"), [("valkey", "valkey"), ("mooncake", "mooncake")])
def test_a_client_that_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, scheme: str, extra: str
) -> None:
    monkeypatch.setattr(address_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"pip install 'sglang-tiered-kv\[{extra}\]'"):
        check_client(OPTION, parse_address(OPTION, f"{scheme}://kv"))
    check_client(OPTION, parse_address(OPTION, "hicache:file"))
