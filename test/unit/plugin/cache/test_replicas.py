"""What data-parallel replicas of a server agree on, which have no group in common."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from support_plugin import on_release
from tiered_kv.plugin.cache import replicas
from tiered_kv.plugin.cache.replicas import Replica, replica_of
from tiered_kv.tiers.kv_shard import kv_shard


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_all_ranks_of_all_replicas_go_by_who_asks_first(folder: Path) -> None:
    servers = [[Replica(index, 2, 0, 2, server=server) for index in range(2)] for server in (7, 8)]
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
    assert Replica(0, 1, 0, 4, server=7).first_word(5) == 5
    assert not list(folder.iterdir())


def test_where_nothing_can_be_written_each_keeps_to_its_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "nowhere"))
    assert [Replica(index, 2, 0, 1, server=7).first_word(index) for index in range(2)] == [0, 1]
    assert "cannot agree on their shares of memory" in caplog.text


def test_ranks_are_numbered_over_all_replicas() -> None:
    numbers = [Replica(index, 3, rank, 2, 7).process for index in range(3) for rank in range(2)]
    assert numbers == list(range(6))


@pytest.mark.parametrize(("dp_size", "index"), [(1, 0), (4, 3)])
def test_a_number_that_a_router_gave_is_none_of_a_replica(
    dp_size: int, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas.hardware, "replica_index", lambda worker: worker)
    assert replica_of(context(dp_size=dp_size, attn_dp_size=1)) == Replica(index, dp_size, 1, 2, 7)


@pytest.mark.parametrize("n_groups", [2, 4, 8])
def test_groups_of_dp_attention_are_replicas_of_neighbours(n_groups: int) -> None:
    found = [
        replica_of(context(tp_size=8, tp_rank=rank, dp_size=1, attn_dp_size=n_groups))
        for rank in range(8)
    ]
    n_ranks = 8 // n_groups
    assert [(one.index, one.rank) for one in found] == [
        (index, rank) for index in range(n_groups) for rank in range(n_ranks)
    ]
    assert {(one.n_replicas, one.n_ranks) for one in found} == {(n_groups, n_ranks)}
    assert [one.process for one in found] == list(range(8))


def context(*, dp_size: int, attn_dp_size: int, tp_size: int = 2, tp_rank: int = 1) -> Any:
    """What SGLang of either release builds a cache with."""
    args = SimpleNamespace(
        # 0.5.17 counts such groups by the first, with a flag.
        dp_size=max(dp_size, attn_dp_size) if on_release.IS_0_5_17 else dp_size,
        attn_dp_size=attn_dp_size,
        enable_dp_attention=attn_dp_size > 1,
        server_number=7,
    )
    params = SimpleNamespace(pp_rank=0, pp_size=1)
    return SimpleNamespace(
        server_args=args, tp_worker=3, tp_size=tp_size, tp_rank=tp_rank, params=params
    )


def test_a_stage_of_a_pipeline_takes_its_share_as_a_replica_does() -> None:
    found = []
    for stage in range(3):
        for rank in range(2):
            ctx = context(dp_size=1, attn_dp_size=1, tp_rank=rank)
            ctx.params = SimpleNamespace(pp_rank=stage, pp_size=3)
            found.append(replica_of(ctx))
    assert [one.process for one in found] == list(range(6))
    assert {(one.n_replicas, one.n_ranks, one.server) for one in found} == {(3, 2, 7)}
    shards = [kv_shard(one.rank, 2, 2).of_replica(one.index, 3) for one in found]
    assert [shard.store for shard in shards] == list(range(6))
    assert {shard.n_stores for shard in shards} == {6}
