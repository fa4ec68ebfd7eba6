"""Whose pages are read first, who holds room on the host, and for how long anybody waits.

Guarantee: what is scarce goes by urgency; a page counts once; who finds no room is not kept from
running; nobody is kept from running for longer than their patience after they came.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from support_tiers.doubles import PATIENCE_S, FaultyDisk
from support_tiers.tier_rig import PAGE_SIZE, Rig, new_disk, on_disk, on_host, tokens_of
from tiered_kv.memory import read_turns
from tiered_kv.memory.prefetch import LINE_LOOK

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


def by_name(rig: Rig, **urgencies: float) -> None:
    rig.hierarchy.prefetch.urgency_of = lambda rid: (0.0, urgencies[rid])


def test_who_finds_no_room_may_run_and_is_read_for_when_there_is_some(rig: Rig) -> None:
    prefetch = rig.hierarchy.prefetch
    rig.arrive("first", LARGE)
    rig.arrive("second", OTHER)
    assert not prefetch.done("first")
    assert prefetch.done("second")
    assert not prefetch.is_settled("second")
    rig.poll_until(lambda: prefetch.is_settled("first"))
    assert rig.disk.n_read_calls == 1
    prefetch.release("first")
    rig.hierarchy.poll()
    assert not prefetch.done("second")
    rig.poll_until(lambda: prefetch.done("second"))
    assert prefetch.loaded_tokens("second") == 5 * PAGE_SIZE
    prefetch.release("second")
    rig.check_idle()


def test_who_does_not_fit_blocks_nobody_who_does(rig: Rig) -> None:
    prefetch = rig.hierarchy.prefetch
    for rid, prompt in (("first", LARGE), ("second", OTHER), ("small", SMALL)):
        rig.arrive(rid, prompt)
    rig.poll_until(lambda: prefetch.is_settled("small"))
    assert prefetch.loaded_tokens("small") == 2 * PAGE_SIZE
    assert not prefetch.is_settled("second")
    for rid in ("first", "second", "small"):
        prefetch.release(rid)
    rig.drain()
    rig.check_idle()


def test_so_many_who_do_not_fit_are_passed_and_no_more(make_rig: MakeRig) -> None:
    rig = make_rig(200, N_HOST, new_disk())
    prompts = [tokens_of(*range(n, n + 5), tail=1) for n in range(10, 100, 10)]
    assert len(prompts) == LINE_LOOK + 1
    for prompt in (*prompts, SMALL):
        on_disk(rig, prompt)
    prefetch = rig.hierarchy.prefetch
    for n, prompt in enumerate(prompts):
        rig.arrive(f"r{n}", prompt)
    rig.arrive("small", SMALL)
    rig.poll_until(lambda: prefetch.is_settled("r0"))
    rig.hierarchy.poll()
    assert not prefetch.is_settled("small")
    prefetch.release("r1")
    rig.poll_until(lambda: prefetch.is_settled("small"))
    prefetch.clear()
    rig.drain()
    rig.check_idle()


def test_the_urgent_are_read_for_first_whoever_came_first(rig: Rig) -> None:
    prefetch = rig.hierarchy.prefetch
    by_name(rig, blocker=0, late=2, urgent=1)
    rig.arrive("blocker", LARGE)
    for rid, prompt in (("late", OTHER), ("urgent", tokens_of(20, 21, 22, 23, tail=1))):
        root = rig.hierarchy.root()
        prefetch.request(rid, root, prompt)
    rig.hierarchy.poll()
    rig.poll_until(lambda: prefetch.is_settled("blocker"))
    prefetch.release("blocker")
    rig.hierarchy.poll()
    assert not prefetch.done("urgent")
    rig.poll_until(lambda: prefetch.is_settled("urgent"))
    prefetch.clear()
    rig.drain()
    rig.check_idle()


def test_an_urgent_request_takes_the_room_of_those_who_are_less_so(rig: Rig) -> None:
    prefetch = rig.hierarchy.prefetch
    by_name(rig, holder=2, least=3, urgent=1)
    rig.arrive("holder", LARGE)
    rig.arrive("least", SMALL)
    rig.poll_until(lambda: prefetch.is_settled("holder") and prefetch.is_settled("least"))
    rig.arrive("urgent", OTHER)
    assert not prefetch.done("urgent")
    rig.poll_until(lambda: prefetch.is_settled("urgent"))
    rig.check()
    # Both may run with what is left of their pages, and are read for again when there is room.
    assert prefetch.done("holder")
    assert not prefetch.is_settled("holder")
    rig.drop_from_host()
    assert rig.usable(LARGE) == (0, 0)
    assert rig.usable(OTHER) == (0, 5)
    prefetch.release("urgent")
    rig.poll_until(lambda: prefetch.is_settled("holder") and prefetch.is_settled("least"))
    assert rig.usable(LARGE) == (0, 5)
    prefetch.clear()
    rig.check_idle()


def test_nobody_takes_the_room_of_those_who_are_as_urgent(rig: Rig) -> None:
    prefetch = rig.hierarchy.prefetch
    by_name(rig, holder=1, equal=1)
    rig.arrive("holder", LARGE)
    rig.poll_until(lambda: prefetch.is_settled("holder"))
    rig.arrive("equal", OTHER)
    for _ in range(5):
        rig.hierarchy.poll()
    rig.drop_from_host()
    assert rig.usable(LARGE) == (0, 5)
    assert not prefetch.is_settled("equal")
    prefetch.clear()
    rig.check_idle()


def test_a_read_is_given_up_for_a_more_urgent_one(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_turns, "READ_STRETCH_PAGES", 2)
    prefetch = rig.hierarchy.prefetch
    by_name(rig, long=2, urgent=1)
    rig.disk.reads.hold()
    rig.arrive("long", LARGE)
    rig.poll_until(lambda: rig.disk.n_read_calls == 1)
    rig.arrive("urgent", OTHER)
    assert prefetch.done("long"), "it is not kept from running any more"
    rig.disk.reads.release()
    rig.poll_until(lambda: prefetch.done("urgent"))
    assert prefetch.loaded_tokens("urgent") == 5 * PAGE_SIZE
    rig.drain()
    assert rig.usable(LARGE) == (0, 2), "the stretch under way came"
    prefetch.clear()
    rig.check_idle()


def test_pages_that_many_wait_for_count_once(make_rig: MakeRig) -> None:
    """The burst after a restart: eight requests that share six pages and have one of their own."""
    rig = make_rig(64, 32, new_disk())
    prompts = [tokens_of(1, 2, 3, 4, 5, 6, 50 + n, tail=1) for n in range(8)]
    on_disk(rig, *prompts)
    prefetch = rig.hierarchy.prefetch
    rig.disk.reads.hold()
    for n, prompt in enumerate(prompts):
        rig.arrive(f"r{n}", prompt)
    assert [prefetch.done(f"r{n}") for n in range(8)] == [False] * 8
    rig.disk.reads.release()
    rig.poll_until(lambda: all(prefetch.done(f"r{n}") for n in range(8)))
    assert {rig.usable(prompt) for prompt in prompts} == {(0, 7)}
    rig.check()
    prefetch.clear()
    rig.check_idle()


def test_pages_count_until_the_last_who_needs_them_has_left(rig: Rig) -> None:
    prefetch = rig.hierarchy.prefetch
    rig.arrive("a", LARGE)
    rig.arrive("b", LARGE)
    rig.arrive("other", OTHER)
    rig.poll_until(lambda: prefetch.is_settled("a") and prefetch.is_settled("b"))
    prefetch.release("a")
    rig.hierarchy.poll()
    assert not prefetch.is_settled("other")
    prefetch.release("b")
    rig.poll_until(lambda: prefetch.is_settled("other"))
    prefetch.clear()
    rig.check_idle()


def test_pages_above_that_the_host_has_count_as_well(make_rig: MakeRig) -> None:
    rig = make_rig(64, N_HOST, new_disk())
    on_host(rig, LARGE)
    rig.context.evict_host(1)
    on_disk_too = tokens_of(40, 41, 42, 43, 44, tail=1)
    rig.serve(on_disk_too)
    rig.drain()
    rig.drop_from_device()
    root = rig.hierarchy.root()
    while rig.hierarchy.peek(root, on_disk_too).end:
        rig.context.evict_host(1)
    prefetch = rig.hierarchy.prefetch
    rig.arrive("a", LARGE)
    rig.poll_until(lambda: prefetch.is_settled("a"))
    rig.arrive("b", on_disk_too)
    assert not prefetch.is_settled("b"), "five pages are held, though few were read"
    prefetch.clear()
    rig.drain()
    rig.check_idle()


def test_a_prefix_larger_than_the_share_is_gone_on_from(make_rig: MakeRig) -> None:
    rig = make_rig(64, N_HOST, new_disk())
    prompt = tokens_of(*range(1, 15), tail=1)
    rig.serve(prompt)
    rig.drain()
    rig.drop_from_device()
    rig.context.evict_host(4)
    assert rig.usable(prompt) == (0, 10)
    assert rig.prefetch("r", prompt) == 4 * PAGE_SIZE
    assert rig.usable(prompt) == (0, 14)
    rig.check_idle()


def test_what_was_above_is_looked_up_again_if_it_has_left(rig: Rig) -> None:
    """It stood in line meanwhile; the disk has all of it."""
    prefetch = rig.hierarchy.prefetch
    rig.prefetch("before", OTHER[: 2 * PAGE_SIZE + 1])
    rig.arrive("holder", LARGE)
    rig.poll_until(lambda: prefetch.is_settled("holder"))
    rig.arrive("later", OTHER)
    rig.drop_from_host()
    assert rig.usable(OTHER) == (0, 0)
    prefetch.release("holder")
    rig.poll_until(lambda: prefetch.is_settled("later"))
    assert prefetch.loaded_tokens("later") == 5 * PAGE_SIZE
    prefetch.clear()
    rig.check_idle()


def test_a_long_read_does_not_hold_up_a_short_one(make_rig: MakeRig) -> None:
    rig = make_rig(300, 600, new_disk())
    long, short = tokens_of(*range(1000, 1200), tail=1), tokens_of(1, 2, tail=1)
    on_disk(rig, long, short)
    disk: FaultyDisk = rig.disk
    prefetch = rig.hierarchy.prefetch
    by_name(rig, long=2, short=1)
    disk.reads.hold()
    rig.arrive("long", long)
    rig.poll_until(lambda: disk.n_read_calls == 1)
    rig.arrive("short", short)
    may_go_on = threading.Event()

    def third_call_waits() -> float:
        if disk.n_read_calls == 3:
            assert may_go_on.wait(PATIENCE_S)
        return 0.0

    disk.reads.delay = third_call_waits
    disk.reads.release()
    rig.poll_until(lambda: prefetch.done("short"))
    assert not prefetch.done("long"), "the stretch under way, the short one, the next stretch"
    may_go_on.set()
    rig.poll_until(lambda: prefetch.done("long"))
    assert prefetch.loaded_tokens("long") == 200 * PAGE_SIZE
    prefetch.clear()
    rig.check_idle()


def test_a_read_is_as_urgent_as_the_most_urgent_who_waits_for_it(make_rig: MakeRig) -> None:
    rig = make_rig(64, 64, new_disk())
    on_disk(rig, LARGE, OTHER, SMALL)
    prefetch = rig.hierarchy.prefetch
    by_name(rig, first=0, long=3, middle=2, urgent=1)
    rig.disk.reads.hold()
    rig.arrive("first", SMALL)
    rig.poll_until(lambda: rig.disk.n_read_calls == 1)
    rig.arrive("long", LARGE)
    rig.arrive("middle", OTHER)
    rig.arrive("urgent", LARGE)
    order: list[str] = []
    rig.disk.reads.release()
    rig.disk.reads.delay = lambda: 0.02

    def all_done() -> bool:
        order.extend(r for r in ("urgent", "middle") if r not in order and prefetch.done(r))
        return len(order) == 2

    rig.poll_until(all_done)
    assert order == ["urgent", "middle"]
    prefetch.clear()
    rig.drain()
    rig.check_idle()


def test_those_who_are_only_expected_come_last(rig: Rig) -> None:
    prefetch = rig.hierarchy.prefetch
    prefetch.request("expected", rig.hierarchy.root(), LARGE, is_ahead=True)
    rig.hierarchy.poll()
    rig.poll_until(lambda: prefetch.is_settled("expected"))
    rig.arrive("r", OTHER)
    assert not prefetch.done("r")
    assert not prefetch.is_settled("expected")
    rig.poll_until(lambda: prefetch.done("r"))
    assert rig.usable(OTHER) == (0, 5)
    prefetch.clear()
    rig.drain()
    rig.check_idle()
