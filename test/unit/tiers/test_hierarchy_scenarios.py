"""The three tiers working together, one story per test, over a pretend engine.

Every page's bytes are a function of its chained hash, so "the right bytes" is checked everywhere:
by each request's layers as they read their prefix, and over all tiers by `Rig.check`.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from support_tiers.tier_rig import FaultyDisk, Rig, new_disk, tokens_of
from tiered_kv.forest.residency import Residency

pytestmark = pytest.mark.timeout(60)

MakeRig = Callable[..., Rig]


# -- the way down and up ---------------------------------------------------------------------------


def test_a_served_prompt_reaches_host_and_disk(make_rig: MakeRig) -> None:
    rig = make_rig(disk=new_disk())
    prompt = tokens_of(1, 2, 3, tail=2)
    rig.serve(prompt)
    rig.drain()
    (node,) = rig.forest.nodes()
    assert [node.state(tier) for tier in rig.forest.tiers] == [Residency.RESIDENT] * 3
    assert rig.stored_pages(prompt) == 3
    rig.check_idle()
    rig.check_disk()


def test_device_to_host_to_device(make_rig: MakeRig) -> None:
    rig = make_rig()
    prompt = tokens_of(1, 2, 3, tail=1)
    rig.serve(prompt)
    rig.drain()
    rig.drop_from_device()
    assert rig.usable(prompt) == (0, 3)
    request = rig.serve(prompt)
    assert (request.n_device, request.n_host) == (0, 12)
    rig.drain()
    assert rig.usable(prompt) == (3, 3 - 3)
    rig.check_idle()


def test_device_to_disk_to_host_to_device(make_rig: MakeRig) -> None:
    rig = make_rig(disk=new_disk())
    prompt = tokens_of(1, 2, 3, tail=1)
    rig.serve(prompt)
    rig.drain()
    rig.drop_from_device()
    rig.drop_from_host()
    assert rig.usable(prompt) == (0, 0)
    assert rig.prefetch("r", prompt) == 12
    assert rig.usable(prompt) == (0, 3)
    assert rig.serve(prompt).n_host == 12
    rig.drain()
    rig.check_idle()


# -- loads that no batch takes ---------------------------------------------------------------------


def test_a_load_whose_request_is_not_admitted_after_all_still_completes(make_rig: MakeRig) -> None:
    rig = make_rig()
    prompt = tokens_of(1, 2, 3)
    rig.serve(prompt)
    rig.drain()
    rig.drop_from_device()
    prefix = rig.hierarchy.match(rig.hierarchy.root(), prompt)
    assert rig.hierarchy.load_back.load(prefix.last) is not None
    # The request did not fit into the batch, and was aborted: nobody calls `start`.
    rig.drain()
    assert rig.usable(prompt) == (3, 0)
    rig.check_idle()


# -- holes in the host tier ------------------------------------------------------------------------


def test_prefetch_over_a_hole_above_pages_that_the_host_has(make_rig: MakeRig) -> None:
    """The read of the upper part failed, another request's below it worked: the host has a hole."""
    rig = make_rig(disk=new_disk())
    disk: FaultyDisk = rig.disk
    upper, whole = tokens_of(1, 2, 9), tokens_of(1, 2, 3, 4, 9)
    rig.serve(whole)
    rig.drain()
    rig.drop_from_device()
    rig.drop_from_host()
    disk.reads.hold()
    disk.reads_to_come.extend([0])  # the first fails, once
    rig.arrive("a", upper)
    rig.arrive("b", whole)
    disk.reads.release()
    rig.drain()
    rig.hierarchy.prefetch.release("a")
    rig.hierarchy.prefetch.release("b")
    assert rig.usable(whole) == (0, 0)
    rig.check_idle()
    # The disk has the upper part still: the next request brings it, and can use all of it.
    assert rig.prefetch("c", whole) == 8
    assert rig.usable(whole) == (0, 5)
    rig.check_idle()
    rig.serve(whole)
    rig.drain()
    rig.check_idle()
