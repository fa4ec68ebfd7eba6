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
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "support_tiers"))

from random_history import History
from tier_rig import BarrierMinimum, Rig, new_disk, random_delays

pytestmark = pytest.mark.timeout(120)

N_HISTORIES = int(os.environ.get("TIERED_KV_PROPERTY_EXAMPLES", "25"))
N_STEPS = 120
LONGEST_DELAY_S = 0.004

# (device pages, host pages, is there a disk): roomy, a tight host, a tight device, no disk.
SIZES = [(24, 40, True), (24, 10, True), (12, 30, True), (16, 6, True), (16, 12, False)]


def make_rig(seed: int, *, rank: int = 0, **options: Any) -> Rig:
    n_device, n_host, has_disk = SIZES[seed % len(SIZES)]
    rig = Rig(n_device, n_host, new_disk() if has_disk else None, shard=rank, **options)
    delays = random_delays(seed * 10 + rank, LONGEST_DELAY_S)
    rig.copier.up.delay = rig.copier.down.delay = delays
    if has_disk:
        rig.disk.reads.delay = rig.disk.writes.delay = delays
    return rig


@pytest.mark.parametrize("seed", range(N_HISTORIES))
def test_random_history(seed: int) -> None:
    rig = make_rig(seed)
    history = History(rig, seed, world=seed)
    try:
        for _ in range(N_STEPS):
            history.step()
        history.finish()
    except BaseException:
        print("\n".join(history.log))
        raise
    finally:
        rig.close()
