"""Real engines and what becomes of them: wrong bytes, full, slow, gone, empty, back.

Guarantee: none of it is an error for whoever asks; what is wrong is a miss and is replaced; what
fails is left alone for a while, in one line of the log, and is used again by itself.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.server import free_port
from harness.stores import Mooncake, Process, valkey_server
from support.engines import engine_or_skip
from tiered_kv.core.ids import Tier
from tiered_kv.tiers.page_format import PageFormat
from tiered_kv.tiers.page_store import StoreTraits
from tiered_kv.tiers.shared import object_store
from tiered_kv.tiers.shared.address import parse_address
from tiered_kv.tiers.shared.blobs import Blobs
from tiered_kv.tiers.shared.envelope import StoreSecrets
from tiered_kv.tiers.shared.link import StoreLink
from tiered_kv.tiers.shared.object_store import ObjectStore

pytestmark = pytest.mark.timeout(120)

MOONCAKE = pytest.param("mooncake", marks=pytest.mark.long)
BOTH = pytest.mark.parametrize("which", ["valkey", MOONCAKE])
PAGE = PageFormat.of_buffers(64, (0, 0, 1, 1), (512, 512, 512, 512))
TRAITS = StoreTraits(Tier.STORE, PAGE, knows_locally=False, is_shared=True)
#: What a busy machine may take, and what shows that nobody waits.
LONG_S, SHORT_S = 5.0, 0.5


def names(*numbers: int) -> list[bytes]:
    return [number.to_bytes(32, "little") for number in numbers]


def pages(*numbers: int) -> list[memoryview]:
    return [memoryview(bytearray([number % 251] * PAGE.page_bytes)) for number in numbers]


def store_over(blobs: Blobs, deadline_s: float = LONG_S, **secrets: Any) -> ObjectStore:
    return ObjectStore(StoreLink(blobs, deadline_s), b"n" * 32, TRAITS, StoreSecrets(**secrets))


def put(store: ObjectStore, *numbers: int) -> int:
    return store.put(names(*numbers), pages(*numbers))


def read(store: ObjectStore, *numbers: int) -> int:
    """How many leading pages came; each is what was put under its name."""
    buffers = [memoryview(bytearray(PAGE.slot_bytes)) for _ in numbers]
    n_read = store.get(names(*numbers), buffers)
    for number, buffer in zip(numbers[:n_read], buffers, strict=False):
        assert bytes(buffer[: PAGE.page_bytes]) == bytes([number % 251]) * PAGE.page_bytes
    return n_read


def until(done: Callable[[], bool], timeout_s: float = 20.0) -> float:
    """Waits; returns for how long."""
    began_s = time.monotonic()
    while not done():
        assert time.monotonic() - began_s < timeout_s, "it does not come back"
        time.sleep(0.05)
    return time.monotonic() - began_s


def valkey_at(port: int, deadline_s: float = LONG_S, more: str = "") -> Any:
    from tiered_kv.tiers.shared.valkey import ValkeyBlobs

    address = parse_address("--tiered-kv-store", f"valkey://127.0.0.1:{port}{more}")
    return ValkeyBlobs(address, deadline_s)


def mooncake_at(cluster: Mooncake, more: str = "") -> Any:
    from tiered_kv.tiers.shared.mooncake import MooncakeBlobs

    blobs = MooncakeBlobs(
        parse_address("--tiered-kv-store", f"mooncake://{cluster.address}{more}"), 2.0
    )
    blobs.connect()
    return blobs


@pytest.fixture
def own_valkey(tmp_path: Path) -> Any:
    with engine_or_skip(lambda: valkey_server(tmp_path)) as server:
        yield server


@pytest.fixture
def own_mooncake(tmp_path: Path) -> Any:
    with engine_or_skip(lambda: Mooncake(tmp_path)) as cluster:
        yield cluster


# -- what is there


@BOTH
@pytest.mark.parametrize("encrypts", [False, True])
def test_wrong_bytes_are_a_miss_and_are_replaced(
    engine: Callable[[str], Blobs], which: str, encrypts: bool
) -> None:
    blobs = engine(which)
    store = store_over(blobs, key=b"k" * 32, encrypts=encrypts)
    assert put(store, 1, 2, 3) == 3
    (_, second, third), size = store._keys(names(1, 2, 3)), store._blob_bytes
    for wrong in (b"x" * size, bytes(size), b"short", b"y" * (size + 5)):
        piece = blobs.memory(len(wrong))
        piece[:] = wrong
        assert list(blobs.write([second], [(piece,)], [True])) == [True]
        assert read(store, 1, 2, 3) == 1
        assert read(store, 3) == 1
        assert put(store, 1, 2, 3) == 3
        assert read(store, 1, 2, 3) == 3
    # Another's page under this name.
    whole = blobs.memory(size)
    assert list(blobs.read([third], [(whole,)])) == [size]
    assert list(blobs.write([second], [(whole,)], [True])) == [True]
    assert read(store, 1, 2, 3) == 1
    assert store._link.stats.bad_pages == 5


@BOTH
def test_holes_are_found(engine: Callable[[str], Blobs], which: str) -> None:
    blobs = engine(which)
    store = store_over(blobs)
    there = [n for n in range(200) if n % 7 or n < 50]
    put(store, *there)
    keys = store._keys(names(*range(210)))
    assert [n for n, found in enumerate(blobs.exist(keys)) if found] == there
    assert [n for n, found in enumerate(blobs.touch(keys)) if found] == there
    assert store.lookup(names(*range(210))) == 56


@BOTH
def test_what_has_gone_is_told_when_it_is_touched(
    engine: Callable[[str], Blobs], which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs: Any = engine(which)
    store = store_over(blobs)
    put(store, 1, 2)
    monkeypatch.setattr(object_store, "TOUCH_AGAIN_S", 0.0)
    store.touch(names(1, 2))
    assert store.drain_dropped() == []
    if which == "valkey":
        blobs._client.flushall()
    else:
        blobs._store.remove_all(True)
    store.touch(names(1, 2))
    assert store.drain_dropped() == names(1, 2)


# -- Valkey


def test_a_valkey_that_was_killed_is_used_again_when_it_is_back_and_empty(
    own_valkey: Process, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    store = store_over(valkey_at(own_valkey.port))
    assert put(store, 1, 2) == 2
    own_valkey.kill_9()
    assert [read(store, 1), store.lookup(names(1)), put(store, 3)] == [0, 0, 0]
    assert store.is_degraded
    n_lines = len(caplog.messages)
    for _ in range(20):
        assert (store.known(names(1)), store.lookup(names(1)), read(store, 1)) == (0, 0, 0)
    assert len(caplog.messages) == n_lines <= 3, "one line for asking, reading and writing each"
    own_valkey.start()
    until(lambda: put(store, 1, 2) == 2)
    until(lambda: read(store, 1, 2) == 2)
    assert not store.is_degraded
    assert f"Store valkey://127.0.0.1:{own_valkey.port} is read again after" in caplog.text


def test_a_frozen_valkey_keeps_nobody_waiting(own_valkey: Process) -> None:
    store = store_over(valkey_at(own_valkey.port, SHORT_S), SHORT_S)
    put(store, 1, 2)
    own_valkey.freeze()
    began_s = time.monotonic()
    assert store.lookup(names(1)) == 0
    assert time.monotonic() - began_s < 3 * SHORT_S
    began_s = time.monotonic()
    for _ in range(10):
        assert store.known(names(1)) == 0
        assert store.lookup(names(1)) == 0
        assert put(store, 3) == 0
    assert time.monotonic() - began_s < 3 * SHORT_S
    own_valkey.thaw()
    until(lambda: store.lookup(names(1, 2)) == 2)
    assert read(store, 1, 2) == 2
    assert put(store, 3) == 1


def test_a_full_valkey_is_read_and_not_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = engine_or_skip(lambda: valkey_server(tmp_path, "8mb", "noeviction"))
    with server:
        store = store_over(valkey_at(server.port))
        n = 0
        while put(store, n) == 1:
            n += 1
            assert n < 1000, "it was to be full"
        assert put(store, n) == 0
        assert read(store, *range(n)) == n
        assert store.is_degraded
        assert caplog.text.count("is not written because of an error (it is full") == 1
        store._link.blobs._client.flushall()  # type: ignore[attr-defined]
        until(lambda: put(store, n) == 1)
        assert "is written again after" in caplog.text


def test_a_valkey_with_a_limit_lets_the_oldest_go(tmp_path: Path) -> None:
    server = engine_or_skip(lambda: valkey_server(tmp_path, "16mb"))
    with server:
        store = store_over(valkey_at(server.port))
        for n in range(200):
            assert put(store, n) == 1
        there = [n for n in range(200) if read(store, n)]
        assert 30 < len(there) < 150
        assert not store.is_degraded


def test_a_valkey_forgets_after_its_ttl(own_valkey: Process) -> None:
    store = store_over(valkey_at(own_valkey.port, more="?ttl=300ms"))
    assert put(store, 1) == 1
    assert read(store, 1) == 1
    until(lambda: read(store, 1) == 0, 3.0)


def test_databases_are_apart(own_valkey: Process) -> None:
    first, second = (store_over(valkey_at(own_valkey.port, more=f"/{n}")) for n in (0, 1))
    put(first, 1)
    assert (first.lookup(names(1)), second.lookup(names(1))) == (1, 0)


def test_nobody_listens_and_nobody_minds() -> None:
    store = store_over(valkey_at(free_port()))
    assert (put(store, 1), read(store, 1), store.lookup(names(1))) == (0, 0, 0)


# -- Mooncake


@pytest.mark.long
def test_from_and_to_the_host_pool_without_a_copy(mooncake_cluster: Mooncake) -> None:
    from tiered_kv.tiers.shared.mooncake import MooncakeBlobs

    pool = np.zeros((8, PAGE.slot_bytes), dtype=np.uint8)
    address = parse_address("--tiered-kv-store", f"mooncake://{mooncake_cluster.address}")
    blobs = MooncakeBlobs(address, 2.0, pool)
    blobs.connect()
    store = store_over(blobs)
    pool[:, : PAGE.page_bytes] = np.arange(70, 78)[:, None]
    slots = [memoryview(pool[n]) for n in range(8)]
    assert store.put(names(*range(70, 78)), slots) == 8
    pool[:] = 0
    assert store.get(names(*range(70, 78)), slots) == 8
    assert pool[:, 0].tolist() == list(range(70, 78))
    assert not pool[:, PAGE.page_bytes :].any()
    blobs.close()


@pytest.mark.long
def test_replicas_survive_an_owner(own_mooncake: Mooncake) -> None:
    blobs = mooncake_at(own_mooncake, "?replicas=2&soft_pin=1m")
    store = store_over(blobs)
    assert put(store, *range(30)) == 30
    assert all(
        len(blobs._store.get_replica_desc(f"tiered-kv:{key}")) == 2
        for key in store._keys(names(*range(30)))
    )
    own_mooncake.owners[0].kill_9()
    until(lambda: read(store, *range(30)) == 30, 30.0)
    blobs.close()


@pytest.mark.long
def test_an_owner_that_is_killed_takes_its_pages_and_no_more(own_mooncake: Mooncake) -> None:
    blobs = mooncake_at(own_mooncake)
    store = store_over(blobs)
    assert put(store, *range(60)) == 60
    own_mooncake.owners[0].kill_9()
    there = sum(read(store, n) for n in range(60))
    assert 0 < there < 60
    # When the master knows of it they can be stored again.
    until(lambda: put(store, *range(60)) == 60 and read(store, *range(60)) == 60, 40.0)
    blobs.close()


@pytest.mark.long
def test_a_full_mooncake_makes_room(own_mooncake: Mooncake) -> None:
    blobs = mooncake_at(own_mooncake)
    big = PageFormat.of_buffers(64, (0, 0), (32768, 32768))
    link = StoreLink(blobs, 2.0)
    store = ObjectStore(
        link, b"n" * 32, StoreTraits(Tier.STORE, big, knows_locally=False, is_shared=True)
    )
    page = memoryview(bytearray(big.page_bytes))
    stored = 0
    for n in range(300):  # 1.2 GB into 512 MB
        stored += store.put(names(n), [page])
    assert stored > 110
    until(lambda: store.put(names(1000), [page]) == 1, 30.0)
    assert store.get(names(1000), [page]) == 1
    blobs.close()


@pytest.mark.long
def test_a_master_that_is_killed_and_comes_back_empty(
    own_mooncake: Mooncake, caplog: pytest.LogCaptureFixture
) -> None:
    blobs = mooncake_at(own_mooncake)
    store = store_over(blobs)
    assert put(store, 1, 2) == 2
    own_mooncake.master.kill_9()
    began_s = time.monotonic()
    assert (store.lookup(names(1)), read(store, 1), put(store, 3)) == (0, 0, 0)
    assert time.monotonic() - began_s < 12.0
    began_s = time.monotonic()
    for _ in range(20):
        assert store.known(names(1)) == 0
        store.lookup(names(1))
    assert time.monotonic() - began_s < 3.0
    own_mooncake.master.start()
    until(lambda: put(store, 1, 2) == 2, 60.0)
    until(lambda: read(store, 1, 2) == 2, 60.0)
    until(lambda: not store.is_degraded, 60.0)
    assert "again after" in caplog.text
    blobs.close()


@pytest.mark.long
def test_a_frozen_master_keeps_nobody_waiting(own_mooncake: Mooncake) -> None:
    blobs = mooncake_at(own_mooncake)
    store = store_over(blobs, SHORT_S)
    put(store, 1)
    own_mooncake.master.freeze()
    began_s = time.monotonic()
    assert store.lookup(names(1)) == 0
    assert time.monotonic() - began_s < 3 * SHORT_S
    assert store.known(names(1)) == 0
    own_mooncake.master.thaw()
    until(lambda: store.lookup(names(1)) == 1, 60.0)
    blobs.close()


@pytest.mark.long
def test_without_a_master_there_is_no_store_until_there_is_one(tmp_path: Path) -> None:
    cluster = engine_or_skip(lambda: Mooncake(tmp_path, n_owners=1))
    from tiered_kv.tiers.shared.mooncake import MooncakeBlobs

    blobs = MooncakeBlobs(parse_address("s", f"mooncake://{cluster.address}"), 2.0)
    store = store_over(blobs)
    assert (store.lookup(names(1)), put(store, 1), read(store, 1)) == (0, 0, 0)
    with cluster:
        until(lambda: put(store, 1) == 1, 60.0)
        until(lambda: read(store, 1) == 1, 60.0)
        blobs.close()
