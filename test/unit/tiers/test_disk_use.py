"""What the disk gives up by itself, and what is used above it without being read from it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from support_tiers.ranks import Ranks
from support_tiers.tier_rig import Rig, new_disk, tokens_of
from tiered_kv.core.ids import Tier
from tiered_kv.forest.residency import Residency
from tiered_kv.memory import store_use as disk_use
from tiered_kv.tiers.in_memory import InMemoryStore

pytestmark = pytest.mark.timeout(60)

MakeRig = Callable[..., Rig]
PROMPT = tokens_of(1, 2, 3, 4, tail=1)
#: What a page of a namespace takes in memory.
SLOT_BYTES = 4096


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    made = Ranks()
    yield made
    made.barrier.abort()
    for rig in made:
        rig.close()


def others(n: int) -> list[int]:
    return [1000 + 10 * n + i for i in range(4)]


def disk_state(rig: Rig) -> set[Residency]:
    prefix = rig.hierarchy.match(rig.hierarchy.root(), PROMPT)
    return {node.state(Tier.DISK) for node in prefix.device}


def small_disk(n_pages: int) -> InMemoryStore:
    return InMemoryStore(capacity_bytes=n_pages * SLOT_BYTES)


def poll(rig: Rig) -> None:
    for _ in range(20):
        rig.hierarchy.poll()
        rig.check()


def wait_for_touches(rig: Rig) -> None:
    rig.hierarchy.poll()
    assert rig.cold.used.queue.wait(10.0)


def test_what_the_disk_gave_up_is_written_again_when_it_is_used(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_use, "TELL_EVERY_S", 1e9)
    rig = make_rig(64, 64, new_disk(small_disk(8)))
    rig.serve(PROMPT)
    rig.drain()
    for n in range(3):
        rig.serve(tokens_of(*others(n)))
        rig.drain()
    poll(rig)
    assert rig.stored_pages(PROMPT) == 0
    assert disk_state(rig) == {Residency.ABSENT}
    assert set(rig.hashes(rig.hierarchy.root(), PROMPT)) <= set(rig.events.gone)
    rig.serve(PROMPT)
    rig.drain()
    assert rig.stored_pages(PROMPT) == 4
    assert disk_state(rig) == {Residency.RESIDENT}
    rig.check_idle()
    rig.check_disk()


def test_a_part_above_what_is_still_there_is_written_again(make_rig: MakeRig) -> None:
    rig = make_rig(64, 64, new_disk())
    longer = tokens_of(1, 2, 3, 4, 5, 6)
    rig.serve(PROMPT)
    rig.serve(longer)
    rig.drain()
    gone = rig.hashes(rig.hierarchy.root(), PROMPT)[1:3]
    drop(rig, gone)
    rig.serve(tokens_of(50))
    rig.drain()
    poll(rig)
    assert rig.stored_pages(longer) == 1
    rig.serve(longer)
    rig.drain()
    assert rig.stored_pages(longer) == 6
    rig.check_idle()
    rig.check_disk()


def drop(rig: Rig, hashes: list[bytes]) -> None:
    """As if the disk had reclaimed the pages."""
    namespace = rig.disk.namespace
    for page_hash in hashes:
        del namespace._store._pages[namespace.namespace_id, page_hash]
        namespace.note_dropped(page_hash)


def test_so_many_that_they_are_not_named(make_rig: MakeRig) -> None:
    store = InMemoryStore()
    rig = make_rig(64, 64, new_disk(store))
    rig.serve(PROMPT)
    rig.drain()
    store.clear()
    rig.serve(tokens_of(50, 51))
    rig.drain()
    poll(rig)
    assert disk_state(rig) == {Residency.ABSENT}
    assert rig.stored_pages(tokens_of(50, 51)) == 2
    rig.serve(PROMPT)
    rig.drain()
    assert rig.stored_pages(PROMPT) == 4
    rig.check_idle()


def test_many_nodes_are_looked_at_some_at_a_time(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_use, "CHECKED_NODES", 2)
    rig = make_rig(64, 64, new_disk())
    prompts = [tokens_of(100 + n) for n in range(12)]
    for prompt in prompts:
        rig.serve(prompt)
    rig.drain()
    drop(rig, [rig.hashes(rig.hierarchy.root(), prompts[n])[0] for n in (0, 5, 11)])
    asked: list[int] = []
    counted = rig.cold.dropped.counted

    def counting(votes: list[int]) -> None:
        asked.append(len(rig.cold.dropped._asked))
        counted(votes)

    monkeypatch.setattr(rig.cold.dropped, "counted", counting)
    rig.serve(tokens_of(50))
    rig.drain()
    while rig.cold.dropped.is_looking:
        rig.hierarchy.poll()
    assert sum(asked) >= len(prompts)
    assert max(asked) == 2
    # Gone from memory in the middle of it, or used again: neither is taken for the other.
    states = [rig.hierarchy.match(rig.hierarchy.root(), p).last.state(Tier.DISK) for p in prompts]
    absent = [n for n, state in enumerate(states) if state is Residency.ABSENT]
    assert absent == [0, 5, 11]
    rig.check_idle()


def test_nodes_that_leave_while_they_are_to_be_looked_at(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_use, "CHECKED_NODES", 1)
    rig = make_rig(64, 64, new_disk())
    for n in range(6):
        rig.serve(tokens_of(100 + n))
    rig.drain()
    root = rig.hierarchy.root()
    drop(rig, [rig.hashes(root, tokens_of(100 + n))[0] for n in range(6)])
    rig.serve(tokens_of(50))
    rig.drain()
    assert rig.cold.dropped.is_looking
    rig.drop_from_device()
    rig.drop_from_host()
    poll(rig)
    assert not rig.cold.dropped.is_looking
    rig.flush()
    rig.drain()
    rig.check_idle()


def test_two_ranks_whose_disks_give_up_different_pages(ranks: Ranks) -> None:
    ranks.serve(PROMPT)
    ranks.drain()
    root = ranks.rigs[0].hierarchy.root()
    hashes = ranks.rigs[0].hashes(root, PROMPT)
    drop(ranks.rigs[1], hashes[2:3])
    ranks.serve(tokens_of(50))
    ranks.drain()
    for _ in range(5):
        ranks.each(lambda rig: rig.hierarchy.poll())
    assert [disk_state(rig) for rig in ranks] == [{Residency.ABSENT}] * 2
    # Either rank tells it, whoever lost which page.
    assert not any(set(hashes) & set(rig.events.held[Tier.DISK]) for rig in ranks)
    ranks.serve(PROMPT)
    ranks.drain()
    assert [rig.stored_pages(PROMPT) for rig in ranks] == [4, 4]
    ranks.each(Rig.check_idle)
    ranks.each(Rig.check_disk)


def test_what_is_used_from_the_device_alone_stays_on_disk(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_use, "TELL_EVERY_S", 0.0)
    rig = make_rig(64, 64, new_disk(small_disk(10)))
    rig.serve(PROMPT)
    rig.drain()
    for n in range(8):
        rig.serve(PROMPT)  # less than a page of its own: nothing is written
        wait_for_touches(rig)
        rig.serve(tokens_of(*others(n)))
        rig.drain()
    assert rig.stored_pages(PROMPT) == 4
    assert rig.stored_pages(tokens_of(*others(0))) == 0
    assert rig.events.gone
    assert not set(rig.events.gone) & set(rig.hashes(rig.hierarchy.root(), PROMPT))
    rig.check_idle()


def test_uses_are_told_now_and_then_and_never_waited_for(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_rig(64, 64, new_disk())
    for n in range(5):
        rig.serve(tokens_of(100 + n))
    rig.drain()
    told: list[list[bytes]] = []
    may_end = threading.Event()

    def touch(hashes: list[bytes]) -> None:
        told.append(list(hashes))
        assert may_end.wait(10.0)

    monkeypatch.setattr(rig.disk, "touch", touch)
    monkeypatch.setattr(disk_use, "TELL_EVERY_S", 0.0)
    rig.cold.used._next_s = 0.0
    started = time.monotonic()
    for _ in range(10):
        for n in range(5):
            rig.serve(tokens_of(100 + n))
        rig.hierarchy.poll()
    assert time.monotonic() - started < 5.0
    assert rig.cold.used.queue.in_flight == 1
    may_end.set()
    wait_for_touches(rig)
    wait_for_touches(rig)
    assert [len(hashes) for hashes in told] == [5, 5], "what was used meanwhile is told at once"
    rig.check()


def test_what_is_noted_is_bounded(make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_use, "USED_NODES_MAX", 3)
    rig = make_rig(64, 64, new_disk())
    for n in range(6):
        rig.serve(tokens_of(100 + n))
    assert len(rig.cold.used._nodes) == 3


def test_nothing_is_looked_for_while_the_disk_is_suspended(make_rig: MakeRig) -> None:
    store = InMemoryStore()
    rig = make_rig(64, 64, new_disk(store))
    rig.serve(PROMPT)
    rig.drain()
    rig.hierarchy.put_stores_away()
    store.clear()
    rig.serve(tokens_of(50))
    rig.drain()
    poll(rig)
    assert disk_state(rig) == {Residency.RESIDENT}
    rig.hierarchy.set_namespace(rig.hierarchy.namespace, rig.stores_of(rig.disk))
    rig.serve(tokens_of(60))
    rig.drain()
    poll(rig)
    assert disk_state(rig) == {Residency.ABSENT}
    rig.check_idle()
