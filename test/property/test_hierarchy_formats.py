"""Random histories, as in `test_hierarchy_histories`, over tiers that keep pages in lossy formats.

What is computed here are pages that the format at hand does not change, so every check stays exact:
a page that was encoded wrongly, decoded as another, mixed up, torn or served too early is seen.
"""

from __future__ import annotations

import os

import pytest

from support_tiers.doubles import random_delays
from support_tiers.random_history import run_history
from support_tiers.tier_rig import Rig, new_disk

pytestmark = pytest.mark.timeout(120)

N_HISTORIES = max(2, int(os.environ.get("TIERED_KV_PROPERTY_EXAMPLES", "12")) // 6)
N_STEPS = 200
LONGEST_DELAY_S = 0.002
# (device pages, host pages): a tight host, a tight device.
SIZES = [(40, 14), (20, 40)]
FORMATS = [("fp8", "fp8"), ("int4", "int4"), ("int2", "int2"), ("raw", "fp8"), ("raw", "int4")]


@pytest.mark.parametrize(("host", "disk"), FORMATS, ids=str)
@pytest.mark.parametrize("seed", range(N_HISTORIES))
def test_random_history(seed: int, host: str, disk: str) -> None:
    n_device, n_host = SIZES[seed % len(SIZES)]
    tier = new_disk(host_format=host, disk_format=disk)
    rig = Rig(n_device, n_host, tier, host_format=host, lasting=disk)
    delays = random_delays(seed, LONGEST_DELAY_S)
    rig.copier.up.delay = rig.copier.down.delay = delays
    tier.reads.delay = tier.writes.delay = delays
    run_history(rig, seed, N_STEPS)
    ways = {(source.name, target.name) for source, target, n in rig.events.moved if n}
    assert {("DEVICE", "HOST"), ("HOST", "DISK")} <= ways
