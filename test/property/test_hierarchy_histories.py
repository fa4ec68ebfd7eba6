"""The hierarchy under random histories with slow, failing and overlapping transfers.

After every step: the forest's own integrity check; every device and host slot is free, in the tree
or a request's, exactly once; the bytes of every resident page in device and host are those computed
for its hash (and each request's layers saw them behind the gate). At the end: no pin, nothing in
flight, no wrong page on disk. With two ranks also: after every step both forests and allocators are
identical, although their transfers finish at different times and their disks fail differently.

TIERED_KV_PROPERTY_EXAMPLES raises the number of histories.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest

from support_tiers.costs import give_costs, page_s
from support_tiers.doubles import PATIENCE_S, BarrierMinimum, random_delays
from support_tiers.random_history import History, run_history
from support_tiers.shared_blobs import SharedBlobs
from support_tiers.tier_rig import Rig, new_disk
from tiered_kv.memory import read_turns
from tiered_kv.scheduler.calibration import Calibrator

pytestmark = pytest.mark.timeout(120)

N_HISTORIES = int(os.environ.get("TIERED_KV_PROPERTY_EXAMPLES", "14"))
N_STEPS = 150
LONGEST_DELAY_S = 0.004

# (device pages, host pages, is there a disk, is there a shared store): roomy, a tight host, a tight
# device, a host smaller than a prompt, no disk; and the same with what others use as well.
SIZES = [
    (48, 40, True, False),
    (40, 14, True, True),
    (20, 40, True, False),
    (32, 6, True, True),
    (32, 20, False, True),
    (40, 14, True, False),
    (32, 20, False, False),
]


@pytest.fixture(autouse=True)
def short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that reads of these short prompts are interrupted by more urgent ones."""
    monkeypatch.setattr(read_turns, "READ_STRETCH_PAGES", 2)


def make_rig(seed: int, *, rank: int = 0, **options: Any) -> Rig:
    n_device, n_host, has_disk, is_shared = SIZES[seed % len(SIZES)]
    disk, remote = new_disk() if has_disk else None, SharedBlobs() if is_shared else None
    rig = Rig(n_device, n_host, disk, shard=rank, remote=remote, **options)
    delays = random_delays(seed * 10 + rank, LONGEST_DELAY_S)
    rig.copier.up.delay = rig.copier.down.delay = delays
    if has_disk:
        rig.disk.reads.delay = rig.disk.writes.delay = delays
    if remote is not None:
        remote.reads.delay = remote.writes.delay = remote.asks.delay = delays
    if seed // len(SIZES) % 2:
        # What is learned from the delays moves boundaries, and ends the patience of some requests.
        model = give_costs(
            rig,
            load_page_s=page_s(rig),
            read_page_s=page_s(rig) / 2,
        )
        rig.context.calibrator = Calibrator(model)
    return rig


@pytest.mark.parametrize("seed", range(N_HISTORIES))
def test_random_history(seed: int) -> None:
    rig = make_rig(seed)
    run_history(rig, seed, N_STEPS)


class Lockstep:
    """Runs one history per rank on a thread each; after every step all ranks must agree."""

    def __init__(self, histories: list[History], barrier: BarrierMinimum) -> None:
        self.histories = histories
        self.barrier = barrier
        self.decided: list[Any] = [None] * len(histories)
        self.meeting = threading.Barrier(len(histories), timeout=PATIENCE_S)
        self.errors: list[BaseException] = []

    def run(self, n_steps: int) -> None:
        threads = [
            threading.Thread(target=self._run_rank, args=(rank, n_steps))
            for rank in range(len(self.histories))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.errors:
            print("\n".join(self.histories[0].log))
            # A broken barrier is only how the other rank heard of it.
            raise min(self.errors, key=lambda e: isinstance(e, threading.BrokenBarrierError))

    def _run_rank(self, rank: int, n_steps: int) -> None:
        history = self.histories[rank]
        try:
            for _ in range(n_steps):
                history.step()
                self._agree(rank)
            history.finish()
            self._agree(rank)
        except BaseException as error:
            self.errors.append(error)
            self.barrier.abort()
            self.meeting.abort()

    def _agree(self, rank: int) -> None:
        self.decided[rank] = self.histories[rank].decisions()
        self.meeting.wait()
        assert self.decided[rank] == self.decided[0], "the ranks have decided differently"
        self.meeting.wait()


@pytest.mark.parametrize("seed", range(N_HISTORIES))
def test_two_ranks_decide_alike(seed: int) -> None:
    barrier = BarrierMinimum(2)
    rigs = [make_rig(seed, rank=rank, collective=barrier.rank(rank)) for rank in range(2)]
    histories = [History(rig, seed, world=seed * 2 + rank) for rank, rig in enumerate(rigs)]
    try:
        Lockstep(histories, barrier).run(N_STEPS)
    finally:
        for rig in rigs:
            rig.close()
