"""Flush, weight updates, clearing the disk: what may never be served afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from support_tiers.tier_rig import NAMESPACE, Rig, new_disk, tokens_of
from tiered_kv.core.ids import Tier
from tiered_kv.forest.key import namespace_hash
from tiered_kv.forest.residency import Residency
from tiered_kv.tiers.cold import writes
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
    """It waits for the copies to and from the device, and for no disk."""
    rig = make_rig(64, 32, new_disk())
    other, third, fourth = tokens_of(5, 6, 7), tokens_of(10, 11), tokens_of(20, 21)
    rig.serve(PROMPT)
    rig.serve(other)
    rig.drain()
    rig.drop_from_device()
    rig.drop_from_host()
    rig.prefetch("r", other)
    rig.copier.up.hold()
    rig.disk.reads.hold()
    rig.disk.writes.hold()
    rig.serve(third)
    rig.poll_until(lambda: rig.writes.in_flight == 1)
    rig.copier.down.hold()
    rig.serve(fourth)
    rig.arrive("waiting", PROMPT)
    prefix = rig.hierarchy.match(rig.hierarchy.root(), other)
    assert rig.hierarchy.load_back.load(prefix.last) is not None
    hierarchy = rig.hierarchy
    assert hierarchy.write_back.to_host.in_flight == 1
    assert rig.reads.in_flight == 1
    assert hierarchy.load_back.n_open == 1
    rig.check()
    rig.meanwhile(rig.flush, rig.copier.up, rig.copier.down)
    rig.check()
    assert len(rig.forest) == 0
    assert not hierarchy.prefetch.tickets
    assert hierarchy.load_back.start() == -1
    assert rig.host.n_pages - rig.host.n_free == 2 + 2 + 4, "third, fourth, and what is being read"
    for prompt in (PROMPT, other, third, fourth):
        rig.serve(prompt)
        rig.check()
    rig.disk.reads.release()
    rig.disk.writes.release()
    rig.drain()
    rig.check_idle()
    rig.check_disk()
    assert rig.host.n_pages - rig.host.n_free == 4 + 3 + 2 + 2


def test_a_flush_does_not_wait_for_a_disk_that_hangs(make_rig: MakeRig) -> None:
    rig = make_rig(64, 16, new_disk())
    prompts = [tokens_of(*range(n, n + 5)) for n in (10, 20, 30)]
    rig.disk.writes.hold()
    for prompt in prompts:
        rig.serve(prompt)
        rig.poll_until(lambda: rig.hierarchy.write_back.to_host.in_flight == 0)
    assert rig.hierarchy.write_back.n_deferred > 0
    started = time.monotonic()
    rig.flush()
    rig.flush()
    assert time.monotonic() - started < 1.0
    assert rig.host.n_free == 1
    rig.check()
    # New pages find room on the host as far as there is some, and the rest in time.
    later = tokens_of(40, 41, 42)
    rig.serve(later)
    rig.check()
    rig.disk.writes.release()
    rig.drain()
    assert [rig.stored_pages(prompt) for prompt in (*prompts, later)] == [5, 5, 5, 3]
    assert rig.host.n_free == 16 - 3
    rig.check_idle()
    rig.check_disk()


def test_what_a_flush_left_behind_is_written_for_a_limited_time(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writes, "BEHIND_FLUSH_S", 0.05)
    rig = make_rig(64, 16, new_disk())
    prompts = [tokens_of(*range(n, n + 4)) for n in (10, 20, 30)]
    rig.disk.writes.hold()
    for prompt in prompts:
        rig.serve(prompt)
        rig.poll_until(lambda: rig.hierarchy.write_back.to_host.in_flight == 0)
    rig.flush()
    time.sleep(0.1)
    rig.serve(PROMPT)
    rig.disk.writes.release()
    rig.drain()
    assert [rig.stored_pages(prompt) for prompt in (*prompts, PROMPT)] == [4, 0, 0, 4]
    assert rig.events.lost == {Tier.DISK: 8}
    assert rig.host.n_free == 16 - 4
    rig.check_idle()


def test_what_finds_no_room_on_the_host_is_lost_with_a_flush_and_counted(make_rig: MakeRig) -> None:
    rig = make_rig(64, 8, new_disk())
    rig.disk.writes.hold()
    for n in (10, 20, 30):
        prompt = tokens_of(*range(n, n + 4))
        rig.serve(prompt)
        rig.poll_until(lambda: rig.hierarchy.write_back.to_host.in_flight == 0)
        rig.forest.pin(rig.hierarchy.match(rig.hierarchy.root(), prompt).last, Tier.HOST)
    rig.flush()
    assert rig.events.lost == {Tier.HOST: 4}
    rig.disk.writes.release()
    rig.drain()
    rig.check_idle()


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
    rig.drain()
    rig.check_idle()
    assert rig.prefetch("again", prompts[2]) == 12
    rig.check_idle()


def test_new_weights_never_meet_old_pages(make_rig: MakeRig) -> None:
    store = InMemoryStore()
    rig = make_rig(disk=new_disk(store))
    rig.serve(PROMPT)
    rig.drain()
    rig.hierarchy.put_stores_away()
    rig.flush()
    rig.disk = new_disk(store, NEW_WEIGHTS)
    rig.hierarchy.set_namespace(NEW_WEIGHTS, rig.stores_of(rig.disk))
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
    rig.hierarchy.set_namespace(NAMESPACE, rig.stores_of(rig.disk))
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
    n_stored = rig.writes.pages_in_flight + len(rig.disk)
    rig.hierarchy.put_stores_away()
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
    rig.hierarchy.put_stores_away()
    prefetch.release("r0")
    rig.poll_until(lambda: prefetch.is_settled("r1"))
    assert prefetch.loaded_tokens("r1") == 0
    prefetch.release("r1")
    rig.check_idle()


def test_forgetting_the_disk(make_rig: MakeRig) -> None:
    """With writes under way, some of which have ended and are not acknowledged yet."""
    store = InMemoryStore()
    rig = make_rig(disk=new_disk(store))
    written, writing, waiting = tokens_of(7, 8), tokens_of(9, 10), tokens_of(11, 12)
    rig.serve(PROMPT)
    rig.drain()
    to_disk = rig.writes
    rig.serve(written)
    rig.poll_until(lambda: to_disk.in_flight == 1)
    assert to_disk.wait(10.0)
    rig.disk.writes.hold()
    for prompt in (writing, waiting):
        rig.hierarchy.write_back.to_host.wait(10.0)
        rig.serve(prompt)
    started = time.monotonic()
    rig.hierarchy.forget_stored(Tier.DISK)
    store.clear()
    assert time.monotonic() - started < 1.0
    assert states(rig, Tier.DISK) == {Residency.ABSENT, Residency.WRITING_BACK}
    assert not rig.events.held[Tier.DISK]
    rig.disk.writes.release()
    rig.drain()
    assert rig.stored_pages(written) == 0
    for node in rig.forest.nodes():
        is_stored = rig.disk.count_prefix(node.page_hashes) == node.n_pages
        assert (node.state(Tier.DISK) is Residency.RESIDENT) <= is_stored
    rig.check_idle()
    # What is used again is stored again.
    for prompt in (PROMPT, written, writing, waiting):
        assert rig.usable(prompt)[0] > 0
        rig.serve(prompt)
        rig.drain()
        assert rig.stored_pages(prompt) == len(prompt) // 4
    rig.check_idle()
    rig.check_disk()


def test_forgetting_the_disk_while_pages_are_read(make_rig: MakeRig) -> None:
    """They arrive: they are right. But nobody may think that they can be read again."""
    rig = make_rig(disk=new_disk())
    rig.serve(PROMPT)
    rig.drain()
    rig.drop_from_device()
    rig.drop_from_host()
    rig.disk.reads.hold()
    rig.arrive("r", PROMPT)
    rig.hierarchy.forget_stored(Tier.DISK)
    rig.disk.reads.release()
    rig.poll_until(lambda: rig.hierarchy.prefetch.done("r"))
    assert rig.usable(PROMPT) == (0, 4)
    assert states(rig, Tier.DISK) == {Residency.ABSENT}
    rig.hierarchy.prefetch.release("r")
    rig.check_idle()


def states(rig: Rig, tier: Tier) -> set[Residency]:
    return {node.state(tier) for node in rig.forest.nodes()}
