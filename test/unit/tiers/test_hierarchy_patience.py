"""How long anybody waits for pages that are being read, and when those should be there.

Guarantee: nobody is kept from running for longer than their patience after they came.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from support_tiers.costs import give_costs, page_s
from support_tiers.tier_rig import PAGE_SIZE, Rig, new_disk, on_disk, tokens_of
from tiered_kv.core.ids import Tier

pytestmark = pytest.mark.timeout(60)

MakeRig = Callable[..., Rig]
#: A host pool of this many pages has room for half of them to be held.
N_HOST = 16
LARGE, OTHER = tokens_of(10, 11, 12, 13, 14, tail=1), tokens_of(20, 21, 22, 23, 24, tail=1)
SMALL = tokens_of(30, 31, tail=1)


@pytest.fixture
def rig(make_rig: MakeRig) -> Rig:
    rig = make_rig(64, N_HOST, new_disk())
    on_disk(rig, LARGE, OTHER, SMALL)
    return rig


def test_patience_runs_from_the_arrival_and_not_from_the_read(make_rig: MakeRig) -> None:
    """Who stood in line for longer than computing takes is read for, but not kept from running."""
    rig = make_rig(64, N_HOST, new_disk())
    give_costs(rig)
    on_disk(rig, LARGE, OTHER)
    prefetch = rig.hierarchy.prefetch
    rig.arrive("holder", LARGE)
    rig.arrive("later", OTHER)
    rig.poll_until(lambda: prefetch.is_settled("holder"))
    deadline = time.monotonic() + 1.2 * 5 * page_s(rig)
    rig.arrive("ticks", tokens_of(70, 71))
    rig.disk.reads.hold()
    while time.monotonic() < deadline:
        time.sleep(0.01)
    prefetch.release("holder")
    # Somebody must wait for time to pass, as on a server that has something to do.
    rig.arrive("clock", LARGE)
    rig.hierarchy.poll()
    rig.hierarchy.poll()
    assert not prefetch.is_settled("later"), "it is read for"
    assert prefetch.done("later"), "but may run"
    rig.disk.reads.release()
    prefetch.clear()
    rig.drain()
    rig.check_idle()


@pytest.mark.parametrize("policy", ["always", "cost"])
def test_whatever_the_load_policy_somebody_waits_for_a_limited_time(
    make_rig: MakeRig, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiered_kv.memory.manager.PATIENCE_S", 0.1)
    rig = make_rig(disk=new_disk())
    give_costs(rig, policy=policy)
    on_disk(rig, LARGE)
    prefetch = rig.hierarchy.prefetch
    rig.disk.reads.hold()
    rig.arrive("r", LARGE)
    assert not prefetch.done("r")
    rig.poll_until(lambda: prefetch.done("r"))
    assert prefetch.loaded_tokens("r") == 0
    # What comes all the same is kept for it until it runs.
    rig.disk.reads.release()
    rig.drain()
    rig.drop_from_host()
    assert rig.usable(LARGE) == (0, 5)
    assert prefetch.loaded_tokens("r") == 5 * PAGE_SIZE
    prefetch.release("r")
    rig.check_idle()


def test_a_lookup_that_hangs_is_not_waited_for_either(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiered_kv.memory.manager.PATIENCE_S", 0.1)
    rig = make_rig(200, 200, new_disk())
    give_costs(rig, policy="always")
    prompt = tokens_of(*range(1, 60), tail=1)
    on_disk(rig, prompt)
    prefetch = rig.hierarchy.prefetch
    may_end = threading.Event()
    monkeypatch.setattr(prefetch.lookups.queue, "_run", lambda _: int(may_end.wait(60)) - 1)
    rig.arrive("r", prompt)
    assert not prefetch.done("r")
    rig.poll_until(lambda: prefetch.done("r"))
    assert prefetch.lookups.queue.in_flight == 1
    may_end.set()
    prefetch.release("r")
    rig.drain()
    rig.check_idle()


def test_who_was_told_to_wait_no_longer_does_not(rig: Rig) -> None:
    prefetch = rig.hierarchy.prefetch
    rig.disk.reads.hold()
    rig.arrive("r", LARGE)
    assert prefetch.take_news() == ["r"]
    prefetch.give_up("r")
    assert prefetch.done("r")
    assert prefetch.take_news() == ["r"]
    assert prefetch.take_news() == []
    prefetch.release("r")
    rig.disk.reads.release()
    rig.drain()
    rig.check_idle()


def test_when_pages_should_be_there(make_rig: MakeRig) -> None:
    rig = make_rig(disk=new_disk())
    give_costs(rig, read_page_s=0.001)
    on_disk(rig, LARGE, OTHER)
    prefetch = rig.hierarchy.prefetch
    rig.disk.reads.hold()
    rig.arrive("first", LARGE)
    rig.arrive("behind", OTHER)
    for rid, seconds in (("first", 0.005), ("behind", 0.01)):
        rig.context.now_s = prefetch.tickets[rid].asked_s
        assert prefetch.arriving(rid) == (pytest.approx(seconds), 5 * PAGE_SIZE)
    rig.disk.reads.release()
    prefetch.clear()
    rig.drain()
    assert all(node.pins(Tier.HOST) == 0 for node in rig.forest.nodes())
