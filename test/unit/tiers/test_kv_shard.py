"""Which ranks have the same KV, and where its pages are kept, by heads, ranks and machines."""

from __future__ import annotations

import pytest

from tiered_kv.tiers.kv_shard import KVShard, kv_shard

MLA = None

Kept = list[tuple[int, int, tuple[int, ...], int]]


def kept(n_ranks: int, n_kv_heads: int | None, n_machines: int = 1) -> Kept:
    """Of each rank: which shard, of how many, who has it on this machine, in which store."""
    shards = [kv_shard(rank, n_ranks, n_kv_heads, n_machines) for rank in range(n_ranks)]
    for rank, shard in enumerate(shards):
        assert shard.rank == rank
        assert shard.holders[shard.place] == rank
        assert shard.is_first == (shard.place == 0)
        assert shard.store < shard.n_stores
        assert shard.n_stores_here * n_machines == shard.n_stores == len({s.store for s in shards})
        # One store, one who reads and writes it.
        assert [s.rank for s in shards if s.store == shard.store and s.is_first] == [
            shard.holders[0]
        ]
    return [(s.index, s.n_shards, s.holders, s.store) for s in shards]


def all_distinct(n_ranks: int) -> Kept:
    return [(rank, n_ranks, (rank,), rank) for rank in range(n_ranks)]


@pytest.mark.parametrize(
    ("n_ranks", "n_kv_heads"), [(1, MLA), (1, 8), (2, 8), (4, 8), (8, 8), (4, 4), (2, 2)]
)
def test_each_rank_keeps_what_no_other_has(n_ranks: int, n_kv_heads: int | None) -> None:
    assert kept(n_ranks, n_kv_heads) == all_distinct(n_ranks)


@pytest.mark.parametrize("n_ranks", [2, 4, 8])
def test_the_latents_of_mla_are_kept_once(n_ranks: int) -> None:
    assert kept(n_ranks, MLA) == [(0, 1, tuple(range(n_ranks)), 0)] * n_ranks


def test_fewer_heads_than_ranks_are_kept_once_each() -> None:
    first, second = (0, 2, (0, 1), 0), (1, 2, (2, 3), 1)
    assert kept(4, 2) == [first, first, second, second]
    assert kept(2, 1) == [(0, 1, (0, 1), 0)] * 2
    assert kept(8, 4) == [(r // 2, 4, (r // 2 * 2, r // 2 * 2 + 1), r // 2) for r in range(8)]


def test_each_machine_keeps_what_it_has() -> None:
    here, there = (0, 1, (0, 1), 0), (0, 1, (2, 3), 1)
    assert kept(4, MLA, n_machines=2) == [here, here, there, there]
    # Who has the same is on the other machine for some of them only: pools would differ in size.
    assert [holders for _, _, holders, _ in kept(6, 2, n_machines=3)] == [(r,) for r in range(6)]
    assert kept(16, 8, n_machines=2) == [
        (r // 2, 8, (r // 2 * 2, r // 2 * 2 + 1), r // 2) for r in range(16)
    ]


def test_heads_that_do_not_come_out_even_are_nobody_elses() -> None:
    assert kept(4, 3) == all_distinct(4)


def test_the_name_says_nothing_of_ranks() -> None:
    assert {kv_shard(rank, 8, MLA).name for rank in range(8)} == {"KV shard 0 of 1"}
    assert kv_shard(0, 1, 8).name == kv_shard(0, 2, 1).name
    assert [kv_shard(rank, 4, 2).name for rank in (1, 2)] == ["KV shard 0 of 2", "KV shard 1 of 2"]


def test_apart_the_name_stays_and_nothing_is_shared() -> None:
    shards = [kv_shard(rank, 4, 2).apart() for rank in range(4)]
    assert [shard.name for shard in shards] == [kv_shard(rank, 4, 2).name for rank in range(4)]
    assert [(s.holders, s.store, s.n_stores) for s in shards] == [((r,), r, 4) for r in range(4)]
    assert KVShard.alone(3, 4).name == "KV shard 3 of 4"


@pytest.mark.parametrize("n_kv_heads", [MLA, 2, 8])
def test_replicas_have_the_same_shards_in_stores_of_their_own(n_kv_heads: int | None) -> None:
    of_one = [kv_shard(rank, 4, n_kv_heads) for rank in range(4)]
    of_two = [[shard.of_replica(index, 2) for shard in of_one] for index in range(2)]
    for shards in of_two:
        assert [s.name for s in shards] == [s.name for s in of_one]
        assert [s.holders for s in shards] == [s.holders for s in of_one]
        assert [s.is_first for s in shards] == [s.is_first for s in of_one]
    stores = [{s.store for s in shards} for shards in of_two]
    assert not stores[0] & stores[1]
    assert stores[0] | stores[1] == set(range(2 * of_one[0].n_stores))
    assert {s.n_stores_here for shards in of_two for s in shards} == {2 * of_one[0].n_stores}
    assert of_one[0].of_replica(0, 1) == of_one[0]
