"""Lookups of long prompts beside the scheduler, and reads that nobody needs any more."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from support_tiers.costs import give_costs
from support_tiers.doubles import Faults
from support_tiers.tier_rig import PAGE_SIZE, Rig, new_disk, on_disk, tokens_of
from tiered_kv.memory.read_turns import READ_STRETCH_PAGES
from tiered_kv.tiers.cold.local_pages import LocalStore
from tiered_kv.tiers.cold.lookup import INLINE_LOOKUP_PAGES

pytestmark = pytest.mark.timeout(60)

MakeRig = Callable[..., Rig]
PROMPT = tokens_of(1, 2, 3, 4, tail=1)


def test_a_read_that_nobody_waits_for_any_more_is_not_begun(make_rig: MakeRig) -> None:
    rig = make_rig(disk=new_disk())
    other = tokens_of(7, 8)
    on_disk(rig, PROMPT, other)
    rig.disk.reads.hold()
    for rid, prompt in (("ahead", other), ("gone", PROMPT), ("shared", PROMPT)):
        rig.arrive(rid, prompt)
    rig.hierarchy.prefetch.release("gone")
    assert not rig.hierarchy.prefetch.done("shared"), "the other one waits for it still"
    rig.hierarchy.prefetch.release("shared")
    rig.disk.reads.release()
    rig.drain()
    assert rig.disk.n_read_calls == 1
    assert (rig.usable(other), rig.usable(PROMPT)) == ((0, 2), (0, 0))
    rig.hierarchy.prefetch.release("ahead")
    rig.check_idle()
    assert rig.prefetch("again", PROMPT) == 16


def test_a_long_read_stops_between_stretches(make_rig: MakeRig) -> None:
    rig = make_rig(n_device_pages=300, n_host_pages=300, disk=new_disk())
    prompt = tokens_of(*range(1, 130))
    on_disk(rig, prompt)
    rig.disk.reads.hold()
    rig.arrive("r", prompt)
    rig.poll_until(lambda: rig.disk.n_read_calls == 1)
    rig.hierarchy.prefetch.release("r")
    rig.disk.reads.release()
    rig.drain()
    assert rig.disk.n_read_calls == 1
    assert rig.usable(prompt) == (0, READ_STRETCH_PAGES)
    assert rig.stored_pages(prompt) == 129
    rig.check_idle()


def test_a_long_prompt_is_looked_up_on_another_thread(make_rig: MakeRig) -> None:
    rig = make_rig(n_device_pages=100, n_host_pages=200, disk=new_disk())
    prompt = tokens_of(*range(1, INLINE_LOOKUP_PAGES + 20), tail=2)
    on_disk(rig, prompt)
    rig.arrive("r", prompt)
    prefetch = rig.hierarchy.prefetch
    assert prefetch.lookups.queue.in_flight == 1
    assert not prefetch.done("r")
    rig.poll_until(lambda: prefetch.done("r"))
    assert rig.usable(prompt) == (0, INLINE_LOOKUP_PAGES + 19)
    prefetch.release("r")
    rig.check_idle()


def test_until_a_lookup_has_said_otherwise_all_pages_are_expected(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has a deadline waits for the answer, as there is time to read what it may find."""
    rig = make_rig(n_device_pages=100, n_host_pages=200, disk=new_disk())
    give_costs(rig, read_page_s=0.001)
    n_pages = INLINE_LOOKUP_PAGES + 20
    prompt = tokens_of(*range(1, n_pages + 1))
    on_disk(rig, prompt)
    rig.stop_clock()
    rig.later(0.0)
    rig.later(60.0)  # nothing is under way, so nobody looks at the clock
    root = rig.hierarchy.root()
    prefix = rig.hierarchy.match(root, prompt, len(prompt) - 1)
    assert prefix.last is root
    lookups, look_up = Faults(), LocalStore.lookup

    def slow(store: LocalStore, hashes: list[bytes]) -> int:
        lookups.pass_through()
        return look_up(store, hashes)

    monkeypatch.setattr(LocalStore, "lookup", slow)
    lookups.hold()
    prefetch = rig.hierarchy.prefetch
    prefetch.request("r", root, prompt)
    seconds = pytest.approx(n_pages * 0.001)
    assert prefetch.arriving("r") == (seconds, n_pages * PAGE_SIZE), "before the clock is read"
    rig.hierarchy.poll()
    assert not prefetch.done("r")
    assert prefetch.arriving("r") == (seconds, n_pages * PAGE_SIZE)
    rig.later(10.0)
    assert prefetch.arriving("r")[0] < -9.0, "it takes too long"
    lookups.release()
    rig.poll_until(lambda: prefetch.done("r"))
    prefetch.release("r")
    rig.drain()
    rig.check_idle()


def test_a_request_that_is_gone_before_its_lookup_is_done(make_rig: MakeRig) -> None:
    rig = make_rig(n_device_pages=100, n_host_pages=200, disk=new_disk())
    prompt = tokens_of(*range(1, INLINE_LOOKUP_PAGES + 20))
    on_disk(rig, prompt)
    rig.arrive("r", prompt)
    rig.hierarchy.prefetch.release("r")
    rig.poll_until(lambda: rig.hierarchy.prefetch.lookups.queue.in_flight == 0)
    rig.drain()
    assert rig.disk.n_read_calls == 0
    rig.check_idle()


def test_a_lookup_whose_disk_fails_is_a_miss(make_rig: MakeRig) -> None:
    rig = make_rig(n_device_pages=100, n_host_pages=200, disk=new_disk())
    prompt = tokens_of(*range(1, INLINE_LOOKUP_PAGES + 20))
    on_disk(rig, prompt)

    def fail(hashes: object) -> int:
        raise OSError("the index is gone")

    rig.disk.count_prefix = fail
    assert rig.prefetch("r", prompt) == 0
    rig.check_idle()
