"""Two rigs in step, for what tensor-parallel ranks must do alike."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from typing import Any

from support_tiers.doubles import BarrierMinimum
from support_tiers.shared_blobs import SharedBlobs
from support_tiers.tier_rig import Rig, new_disk
from tiered_kv.tiers.alignment import ALIGNMENT_BYTES


class Ranks:
    """Two rigs, each with KV of its own shard, a host pool, a disk, and perhaps what is shared.

    have_same: both have the same shard, so one pool and one disk, which is the first one's.
    """

    def __init__(self, remote: SharedBlobs | None = None, *, have_same: bool = False) -> None:
        self.barrier = BarrierMinimum(2)
        n_host_pages = 64 if remote else 16
        pool = mmap.mmap(-1, n_host_pages * ALIGNMENT_BYTES) if have_same else None
        self.rigs = [
            Rig(
                64 if remote else 32,
                n_host_pages,
                None if rank and have_same else new_disk(),
                collective=self.barrier.rank(rank),
                shard=0 if have_same else rank,
                remote=remote,
                pool=pool,
                place=rank,
            )
            for rank in range(2)
        ]

    def __iter__(self) -> Iterator[Rig]:
        return iter(self.rigs)

    def each(self, step: Callable[[Rig], Any]) -> list[Any]:
        """Carries the step out on both ranks at once; both must then see the same."""
        outcomes = self.barrier.on_each(lambda rank: step(self.rigs[rank]))
        self.check()
        return outcomes

    def check(self) -> None:
        first, second = self.rigs
        assert first.forest.view() == second.forest.view()
        assert first.allocator.free_pages == second.allocator.free_pages
        assert first.host.n_free == second.host.n_free
        for rig in self.rigs:
            rig.check()

    def serve(self, prompt: Any) -> list[Any]:
        return self.each(lambda rig: rig.serve(prompt))

    def drain(self) -> None:
        self.each(Rig.drain)

    def on_disk(self, *prompts: Any) -> None:
        """The prompts' pages are on both disks alone."""
        for prompt in prompts:
            self.serve(prompt)
        self.drain()
        self.each(Rig.drop_from_device)
        self.each(Rig.drop_from_host)

    def prefetch(self, rid: str, prompt: Any) -> list[int]:
        return self.each(lambda rig: rig.prefetch(rid, prompt))
