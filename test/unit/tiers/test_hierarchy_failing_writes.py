"""Pages on their way down whose copy or write fails: a copy is lost, and nothing else.

Every page's bytes are a function of its chained hash, so "the right bytes" is checked everywhere.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from support_tiers.tier_rig import Rig, new_disk, tokens_of
from tiered_kv.core.ids import Tier
from tiered_kv.forest.residency import Residency

pytestmark = pytest.mark.timeout(60)

MakeRig = Callable[..., Rig]


def states(rig: Rig, tier: Tier) -> list[Residency]:
    """Of all nodes, from the roots down."""
    return [node.state(tier) for node in sorted(rig.forest.nodes(), key=lambda n: n.end)]


def test_a_copy_to_the_host_that_raises_gives_its_pages_back(make_rig: MakeRig) -> None:
    rig = make_rig(disk=new_disk())
    rig.copier.down.error = OSError("no such luck")
    prompt = tokens_of(1, 2, 3)
    rig.serve(prompt)
    rig.drain()
    assert rig.host.n_free == rig.host.n_pages
    assert rig.usable(prompt) == (3, 0)
    rig.check_idle()
    # The pages are still good on the device, and are tried again when they are used again.
    rig.copier.down.error = None
    rig.serve(prompt)
    rig.drain()
    assert rig.stored_pages(prompt) == 3
    rig.check_idle()
    rig.check_disk()


def test_a_failing_copy_above_what_never_fits_does_not_go_on_for_ever(make_rig: MakeRig) -> None:
    rig = make_rig(32, 4, new_disk())
    rig.copier.down.error = OSError("no such luck")
    rig.serve(tokens_of(1))
    rig.serve(tokens_of(1, *range(2, 20)))
    rig.drain()
    rig.check_idle()


@pytest.mark.parametrize("n_pages", [0, 1, 2])
def test_a_write_that_the_disk_cuts_short(make_rig: MakeRig, n_pages: int) -> None:
    rig = make_rig(disk=new_disk())
    rig.disk.pages_per_write = n_pages
    prompt = tokens_of(1, 2, 3)
    rig.serve(prompt)
    rig.drain()
    assert rig.stored_pages(prompt) == n_pages
    assert states(rig, Tier.DISK) == [Residency.ABSENT]
    rig.check_idle()
    rig.check_disk()
    rig.disk.pages_per_write = None
    rig.serve(prompt)
    rig.drain()
    assert rig.stored_pages(prompt) == 3
    rig.check_idle()


def test_a_degraded_disk_costs_nothing_but_itself(make_rig: MakeRig) -> None:
    rig = make_rig(16, 8, new_disk())
    rig.disk.writes.error = OSError("disk full")
    for n in range(10):
        rig.serve(tokens_of(n, n + 1, n + 2, tail=1))
        rig.check()
    rig.drain()
    assert len(rig.disk) == 0
    assert states(rig, Tier.DISK) == [Residency.ABSENT] * len(rig.forest)
    rig.check_idle()
