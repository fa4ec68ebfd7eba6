"""Flush, weight updates, clearing the disk: what may never be served afterwards."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from support_tiers.tier_rig import NAMESPACE, Rig, new_disk, tokens_of
from tiered_kv.core.ids import Tier
from tiered_kv.forest.key import namespace_hash
from tiered_kv.forest.residency import Residency
from tiered_kv.tiers.in_memory import InMemoryStore

pytestmark = pytest.mark.timeout(60)

MakeRig = Callable[..., Rig]
PROMPT = tokens_of(1, 2, 3, 4, tail=1)
NEW_WEIGHTS = namespace_hash("the model after an update")


def test_flush_empties_device_and_host_and_keeps_the_disk(make_rig: MakeRig) -> None:
    rig = make_rig(disk=new_disk())
    rig.serve(PROMPT)
    rig.drain()
    rig.flush()
    assert len(rig.forest) == 0
    assert rig.host.n_free == rig.host.n_pages
    assert rig.usable(PROMPT) == (0, 0)
    rig.check_idle()
    assert rig.prefetch("r", PROMPT) == 16
    rig.serve(PROMPT)
    rig.drain()
    rig.check_idle()


def test_flush_with_everything_in_flight(make_rig: MakeRig) -> None:
    rig = make_rig(64, 32, new_disk())
    other, third, fourth = tokens_of(5, 6, 7), tokens_of(10, 11), tokens_of(20, 21)
    rig.serve(PROMPT)
    rig.serve(other)
    rig.drain()
    rig.drop_from_device()
    rig.drop_from_host()
    rig.prefetch("r", other)
    faults = (rig.copier.up, rig.copier.down, rig.disk.reads, rig.disk.writes)
    rig.copier.up.hold()
    rig.disk.reads.hold()
    rig.disk.writes.hold()
    rig.serve(third)
    rig.poll_until(lambda: rig.hierarchy.write_back.to_disk.in_flight == 1)
    rig.copier.down.hold()
    rig.serve(fourth)
    rig.arrive("waiting", PROMPT)
    prefix = rig.hierarchy.match(rig.hierarchy.root(), other)
    assert rig.hierarchy.load_back.load(prefix.last) is not None
    hierarchy = rig.hierarchy
    assert hierarchy.write_back.to_host.in_flight == 1
    assert hierarchy.prefetch.queue.in_flight == 1
    assert hierarchy.load_back.n_open == 1
    rig.check()
    rig.meanwhile(rig.flush, *faults)
    rig.check_idle()
    assert len(rig.forest) == 0
    assert not hierarchy.prefetch.tickets
    assert hierarchy.load_back.start() == -1
    for prompt in (PROMPT, other, third, fourth):
        rig.serve(prompt)
    rig.drain()
    rig.check_idle()
    rig.check_disk()


def test_flush_with_requests_queued_for_room(make_rig: MakeRig) -> None:
    rig = make_rig(64, 8, new_disk())
    prompts = [tokens_of(n, n + 1, n + 2) for n in (10, 20, 30)]
    for prompt in prompts:
        rig.serve(prompt)
        rig.drain()
    rig.drop_from_device()
    rig.drop_from_host()
    for n, prompt in enumerate(prompts):
        rig.arrive(f"r{n}", prompt)
    rig.flush()
    assert not rig.hierarchy.prefetch.tickets
    rig.check_idle()
    assert rig.prefetch("again", prompts[2]) == 12
    rig.check_idle()


def test_new_weights_never_meet_old_pages(make_rig: MakeRig) -> None:
    store = InMemoryStore()
    rig = make_rig(disk=new_disk(store))
    rig.serve(PROMPT)
    rig.drain()
    rig.hierarchy.suspend_disk()
    rig.flush()
    rig.disk = new_disk(store, NEW_WEIGHTS)
    rig.hierarchy.set_namespace(NEW_WEIGHTS, rig.disk)
    assert rig.usable(PROMPT) == (0, 0)
    rig.arrive("r", PROMPT)
    assert not rig.hierarchy.prefetch.tickets
    rig.serve(PROMPT)  # checks its KV against the new namespace's
    rig.drain()
    assert rig.stored_pages(PROMPT) == 4
    rig.check_idle()
    rig.check_disk()
    # Back to the old weights (a LoRA merged and unmerged, say): the disk knows them still.
    rig.flush()
    rig.disk = new_disk(store)
    rig.hierarchy.set_namespace(NAMESPACE, rig.disk)
    assert rig.prefetch("s", PROMPT) == 16
    rig.serve(PROMPT)
    rig.drain()
    rig.check_idle()


def test_pages_computed_between_the_update_and_the_flush_have_no_name(make_rig: MakeRig) -> None:
    """Whatever stage they are in when the disk is suspended, and whoever waits for the disk."""
    rig = make_rig(64, 16, new_disk())
    on_disk = tokens_of(50, 51, 52, 53, 54, 55)
    rig.serve(on_disk)
    rig.drain()
    rig.drop_from_device()
    rig.drop_from_host()
    rig.disk.writes.hold()
    for n in range(6):  # more than may be in flight: some wait
        rig.serve(tokens_of(100 + n, 200 + n))
        rig.poll_until(lambda: rig.hierarchy.write_back.to_host.in_flight == 0)
    assert rig.hierarchy.write_back.n_deferred > 0
    n_stored = rig.hierarchy.write_back.to_disk.pages_in_flight + len(rig.disk)
    rig.hierarchy.suspend_disk()
    rig.disk.writes.release()
    rig.serve(PROMPT)
    rig.arrive("r", on_disk)
    assert rig.hierarchy.prefetch.done("r")
    rig.drain()
    assert len(rig.disk) == n_stored
    assert rig.stored_pages(PROMPT) == 0
    rig.check_idle()
    rig.flush()
    rig.check_idle()


def test_a_request_queued_for_the_disk_when_it_is_suspended(make_rig: MakeRig) -> None:
    rig = make_rig(64, 16, new_disk())
    prompts = [tokens_of(n, n + 1, n + 2, n + 3, n + 4, tail=1) for n in (10, 20)]
    for prompt in prompts:
        rig.serve(prompt)
        rig.drain()
    rig.drop_from_device()
    rig.drop_from_host()
    for n, prompt in enumerate(prompts):
        rig.arrive(f"r{n}", prompt)
    prefetch = rig.hierarchy.prefetch
    rig.poll_until(lambda: prefetch.done("r0"))
    assert not prefetch.is_settled("r1")
    rig.hierarchy.suspend_disk()
    prefetch.release("r0")
    rig.poll_until(lambda: prefetch.is_settled("r1"))
    assert prefetch.loaded_tokens("r1") == 0
    prefetch.release("r1")
    rig.check_idle()


def test_forgetting_the_disk(make_rig: MakeRig) -> None:
    store = InMemoryStore()
    rig = make_rig(disk=new_disk(store))
    rig.serve(PROMPT)
    rig.drain()
    rig.disk.writes.hold()
    rig.serve(tokens_of(7, 8))
    rig.poll_until(lambda: rig.hierarchy.write_back.to_disk.in_flight == 1)
    rig.meanwhile(rig.hierarchy.forget_disk, rig.disk.writes)
    store.clear()
    assert all(node.state(Tier.DISK) is Residency.ABSENT for node in rig.forest.nodes())
    assert rig.usable(PROMPT) == (4, 0)
    rig.check_idle()
    # What is used again is stored again.
    rig.serve(PROMPT)
    rig.drain()
    assert rig.stored_pages(PROMPT) == 4
    rig.check_idle()
    rig.check_disk()


def test_forgetting_the_disk_while_pages_are_read(make_rig: MakeRig) -> None:
    rig = make_rig(disk=new_disk())
    rig.serve(PROMPT)
    rig.drain()
    rig.drop_from_device()
    rig.drop_from_host()
    rig.disk.reads.hold()
    rig.arrive("r", PROMPT)
    rig.meanwhile(rig.hierarchy.forget_disk, rig.disk.reads)
    assert rig.hierarchy.prefetch.done("r")
    assert rig.usable(PROMPT) == (0, 4)
    assert all(node.state(Tier.DISK) is Residency.ABSENT for node in rig.forest.nodes())
    rig.hierarchy.prefetch.release("r")
    rig.check_idle()
