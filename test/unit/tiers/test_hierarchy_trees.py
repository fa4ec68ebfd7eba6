"""Who shares KV within a namespace, and what stays above the disk for want of a lasting name."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from support_tiers.tier_rig import Rig, new_disk, tokens_of
from tiered_kv.core.ids import Tier
from tiered_kv.forest.key import TreeKey
from tiered_kv.forest.residency import Residency

pytestmark = pytest.mark.timeout(60)

MakeRig = Callable[..., Rig]
PROMPT = tokens_of(1, 2, 3, 4, tail=1)
ADAPTER = TreeKey(adapter=b"what it weighs")


@pytest.mark.parametrize(
    "other",
    [
        TreeKey(),
        TreeKey(adapter=b"trained again"),
        TreeKey(salt=b"what it weighs"),
        TreeKey(extra_key=b"what it weighs"),
        TreeKey(adapter=b"what it weighs", salt=b"tenant"),
        TreeKey(adapter=b"what it weighs", extra_key=b"tenant"),
    ],
)
def test_a_tree_is_found_by_all_of_its_key_in_every_tier(make_rig: MakeRig, other: TreeKey) -> None:
    rig = make_rig(disk=new_disk())
    rig.serve(PROMPT, ADAPTER)
    rig.drain()
    assert (rig.usable(PROMPT, ADAPTER), rig.usable(PROMPT, other)) == ((4, 0), (0, 0))
    rig.drop_from_device()
    assert (rig.usable(PROMPT, ADAPTER), rig.usable(PROMPT, other)) == ((0, 4), (0, 0))
    rig.flush()
    assert rig.prefetch("other", PROMPT, other) == 0
    assert rig.prefetch("same", PROMPT, ADAPTER) == 16
    rig.check_idle()


def test_what_has_no_lasting_name_is_on_device_and_host_only(make_rig: MakeRig) -> None:
    rig = make_rig(disk=new_disk())
    unnamed = TreeKey(adapter=b"random", is_lasting=False)
    rig.serve(PROMPT, unnamed)
    rig.serve(PROMPT)
    rig.drain()
    assert rig.stored_pages(PROMPT) == 4
    assert rig.stored_pages(PROMPT, unnamed) == 0
    rig.drop_from_device()
    assert rig.usable(PROMPT, unnamed) == (0, 4)
    # Used again, it is looked at again; longer, it has a child in the same tree.
    rig.serve(tokens_of(1, 2, 3, 4, 5, tail=1), unnamed)
    rig.drain()
    nodes = [node for node in rig.forest.nodes() if node.root.tree_key is unnamed]
    assert len(nodes) > 1
    assert {node.state(Tier.DISK) for node in nodes} == {Residency.ABSENT}
    rig.check_idle()
