"""Requests' lives on two ranks of SGLang's own loop, of a model with recurrent state.

Method: `support_plugin.lives`, the same on both ranks, each on a thread of its own. The second's
disk is slow at times, fails, and loses all it has, which the first one's does not.
Guarantee: that of `test_recurrent_lives.py` on each rank, and both do the same: they give the same
answers from the same places, and end with the same checkpoints in the same slots. A rank that
waits for another that does something else breaks the test.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

pytest.importorskip("sglang")

from support_plugin.decode_loop import PretendDisk
from support_plugin.decode_requests import Oracle
from support_plugin.hybrid_loop import HybridLoop
from support_plugin.lives import History, compare, forget_at_times, live, surroundings
from support_tiers.doubles import BarrierMinimum

#: (page size, device pages, chunk, checkpoints)
SHAPES: list[tuple[int, int, int, int]] = [(4, 16, 8, 6), (4, 24, 64, 40), (2, 40, 16, 12)]
DELAY_S = 0.002


class HistoryWithTrouble(History):
    """Of a rank whose disk has troubles of its own."""

    def __init__(self, loop: Any, disk: PretendDisk, number: int) -> None:
        super().__init__(loop, disk, number)
        self._own_disk, self._own_dice = disk, random.Random(-number - 1)

    def _trouble(self) -> None:
        super()._trouble()
        dice, disk = self._own_dice, self._own_disk
        if dice.random() < 0.05:
            delay_s = dice.choice([0.0, DELAY_S])
            disk.reads.delay = disk.writes.delay = lambda: delay_s
        if dice.random() < 0.03:
            disk.writes.error = None if disk.writes.error else OSError("on purpose, here alone")
        if dice.random() < 0.03:
            disk.reads.errors_to_come.append(OSError("on purpose, here alone"))
        if dice.random() < 0.01:
            disk.clear()
            self.counts["lost"] += 1


class TwoRanks:
    def __init__(self, args: Any, page_size: int, n_pages: int, chunk: int, n_states: int) -> None:
        self._barrier = BarrierMinimum(2)
        self.disks = [PretendDisk(), PretendDisk()]
        self.loops = [
            HybridLoop(
                args,
                n_states=n_states,
                collective=self._barrier.rank(rank),
                page_size=page_size,
                n_pages=n_pages,
                n_host_pages=2 * n_pages,
                chunk_tokens=chunk,
                disk=disk,
            )
            for rank, disk in enumerate(self.disks)
        ]

    def run(self, oracle: Oracle, number: int) -> Counter[str]:
        kinds = (History, HistoryWithTrouble)
        parts = zip(kinds, self.loops, self.disks, strict=True)
        histories = [kind(loop, disk, number) for kind, loop, disk in parts]

        def run_one(rank: int) -> None:
            live(histories[rank], self.disks[rank])
            forget_at_times(self.loops[rank], number)

        with surroundings(number):
            self._barrier.on_each(run_one)
        first, second = (compare(history, oracle, number) for history in histories)
        lost = second.pop("lost", 0)
        assert first == second
        assert self._kept(0) == self._kept(1)
        return first + Counter(lost=lost)

    def _kept(self, rank: int) -> list[tuple[bytes, int]]:
        return list(self.loops[rank].tree_cache.states.table._kept.items())

    def close(self) -> None:
        for loop in self.loops:
            loop.close()


def run_all(args: Any, n_histories: int) -> None:
    totals: Counter[str] = Counter()
    oracle = Oracle(args, overlap=False)
    for shape, sizes in enumerate(SHAPES):
        ranks = TwoRanks(args, *sizes)
        try:
            for number in range(shape, n_histories, len(SHAPES)):
                totals += ranks.run(oracle, number)
            totals["seeded"] += ranks.loops[0].tp_worker.n_seeded
        finally:
            ranks.close()
    oracle.close()
    print(totals)
    for what in ("aborted", "retracted", "device", "host", "disk", "seeded", "lost"):
        assert totals[what] > n_histories // 20, totals


def test_two_ranks_do_the_same(args: Any) -> None:
    run_all(args, 30)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_two_ranks_do_the_same_five_hundred_times(args: Any) -> None:
    run_all(args, 500)
