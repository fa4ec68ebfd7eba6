"""What data-parallel replicas of a server agree on, which have no group in common."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tiered_kv.plugin.cache import replicas
from tiered_kv.plugin.cache.replicas import Replica, replica_of


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_all_ranks_of_all_replicas_go_by_who_asks_first(folder: Path) -> None:
    servers = [[Replica(index, 2, 2, server=server) for index in range(2)] for server in (7, 8)]
    words: dict[tuple[int, int, int], int] = {}

    def ask(replica: Replica, rank: int) -> None:
        value = 100 * replica.server + 10 * replica.index
        words[replica.server, replica.index, rank] = replica.first_word(value)

    threads = [
        threading.Thread(target=ask, args=(replica, rank))
        for server in servers
        for replica in server
        for rank in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for server in (7, 8):
        heard = {word for key, word in words.items() if key[0] == server}
        assert len(heard) == 1
        assert heard < {100 * server, 100 * server + 10}
    assert len(words) == 8
    assert not list(folder.iterdir()), "something was left behind"


def test_one_replica_asks_nobody(folder: Path) -> None:
    assert Replica(0, 1, 4, server=7).first_word(5) == 5
    assert not list(folder.iterdir())


def test_where_nothing_can_be_written_each_keeps_to_its_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "nowhere"))
    assert [Replica(index, 2, 1, server=7).first_word(index) for index in range(2)] == [0, 1]
    assert "cannot agree on their shares of memory" in caplog.text


def test_ranks_are_numbered_over_all_replicas() -> None:
    numbers = [Replica(index, 3, 2, 7).process(rank) for index in range(3) for rank in range(2)]
    assert numbers == list(range(6))


@pytest.mark.parametrize(("dp_size", "index"), [(1, 0), (4, 3)])
def test_a_number_that_a_router_gave_is_none_of_a_replica(
    dp_size: int, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas.hardware, "replica_index", lambda worker: worker)
    args = SimpleNamespace(dp_size=dp_size, server_number=7)
    ctx: Any = SimpleNamespace(server_args=args, tp_worker=3, tp_size=2)
    assert replica_of(ctx) == Replica(index, dp_size, 2, 7)
