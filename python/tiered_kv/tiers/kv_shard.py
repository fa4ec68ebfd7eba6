"""Which of the distinct shards of a model's KV a rank has, and who on its machine has the same.

Tensor-parallel ranks share out the KV heads. Where there are fewer heads than ranks, neighbours
have the same head; and the latents of MLA are the same on all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class KVShard:
    """The shard that one rank has, and where its pages are kept below the device.

    The ranks that have the same shard on the same machine keep its pages once: one pool on the
    host, and one store on the local disk, which the first of them reads and writes.
    """

    rank: int
    n_ranks: int
    index: int
    """Which of `n_shards`, the distinct ones."""
    n_shards: int
    holders: tuple[int, ...]
    """The ranks of this machine that have it, this one among them, ascending."""
    store: int
    """Which of `n_stores`, those of all machines together."""
    n_stores: int
    n_machines: int

    @classmethod
    def alone(cls, rank: int, n_ranks: int, n_machines: int = 1) -> KVShard:
        """Of a rank whose KV no other has."""
        return cls(rank, n_ranks, rank, n_ranks, (rank,), rank, n_ranks, n_machines)

    @property
    def name(self) -> str:
        return f"KV shard {self.index} of {self.n_shards}"

    @property
    def is_first(self) -> bool:
        """Whether this rank reads and writes the store."""
        return self.rank == self.holders[0]

    @property
    def n_stores_here(self) -> int:
        """How many of the stores are on this machine."""
        return self.n_stores // self.n_machines

    @property
    def place(self) -> int:
        """Of this rank among the holders."""
        return self.holders.index(self.rank)

    def of_replica(self, index: int, n_replicas: int) -> KVShard:
        """The same shard in one of several replicas, each of which has stores of its own."""
        return replace(
            self, store=index * self.n_stores + self.store, n_stores=n_replicas * self.n_stores
        )

    def apart(self) -> KVShard:
        """The same shard, kept by this rank for itself."""
        alone = KVShard.alone(self.rank, self.n_ranks, self.n_machines)
        return replace(alone, index=self.index, n_shards=self.n_shards)


def kv_shard(rank: int, n_ranks: int, n_kv_heads: int | None, n_machines: int = 1) -> KVShard:
    """The shard of rank `rank` of `n_ranks`, which are spread over the machines evenly, in order.

    n_kv_heads: of the whole model; None for the latents of MLA.
    """
    n_shards = 1 if n_kv_heads is None else min(n_ranks, n_kv_heads)
    if n_ranks % n_shards:
        return KVShard.alone(rank, n_ranks, n_machines)
    kept = [(r * n_shards // n_ranks, r * n_machines // n_ranks) for r in range(n_ranks)]
    index, _ = own = kept[rank]
    stores = sorted(set(kept))
    holders = tuple(r for r in range(n_ranks) if kept[r] == own)
    shard = KVShard(
        rank, n_ranks, index, n_shards, holders, stores.index(own), len(stores), n_machines
    )
    # Ranks decide alike, so their pools are of one size: as many holders for every one of them.
    is_even = len({kept.count(one) for one in stores}) == 1
    return shard if is_even else shard.apart()
