"""A disk and a store that others use as well, below one host.

Guarantee: what is computed goes to both; what both have comes from the nearer one, and what one
lacks from the other, in one prompt; what the farther one forgets, breaks or invents is computed,
and never served; nobody waits for a store that does not answer longer than computing takes.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator

import pytest

from support_tiers.costs import give_costs
from support_tiers.ranks import Ranks
from support_tiers.shared_blobs import SharedBlobs, lies
from support_tiers.tier_rig import PAGE_SIZE, Rig, new_disk, on_disk, on_host, tokens_of
from support_tiers.two_stores import far, lose_on_disk, n_blobs
from tiered_kv.core.ids import Tier
from tiered_kv.forest.key import TreeKey
from tiered_kv.forest.residency import Residency
from tiered_kv.tiers.cold.lookup import INLINE_LOOKUP_PAGES
from tiered_kv.tiers.in_memory import InMemoryStore
from tiered_kv.tiers.shared.object_store import ObjectStore

pytestmark = pytest.mark.timeout(60)

MakeRig = Callable[..., Rig]
PROMPT = tokens_of(*range(1, 9), tail=1)
N_PAGES = 8
RESIDENT, ABSENT = Residency.RESIDENT, Residency.ABSENT


def test_what_is_computed_goes_to_both(rig: Rig) -> None:
    rig.serve(PROMPT)
    rig.drain()
    assert (rig.stored_pages(PROMPT), n_blobs(rig, PROMPT)) == (N_PAGES, N_PAGES)
    last = rig.hierarchy.match(rig.hierarchy.root(), PROMPT).last
    assert [last.state(tier) for tier in rig.forest.tiers] == [RESIDENT] * 4
    rig.check_idle()


def test_what_has_no_name_goes_to_neither(rig: Rig) -> None:
    rig.serve(PROMPT, TreeKey(adapter=b"random", is_lasting=False))
    rig.drain()
    assert not rig.remote.blobs  # type: ignore[union-attr]
    assert len(rig.disk) == 0


def test_both_have_it_and_the_nearer_one_is_read(rig: Rig) -> None:
    on_disk(rig, PROMPT)
    rig.remote.reads.error = OSError("nobody should ask")  # type: ignore[union-attr]
    assert rig.prefetch("r", PROMPT) == N_PAGES * PAGE_SIZE
    assert rig.disk.n_read_calls == 1
    rig.check_idle()


def test_what_the_disk_lacks_comes_from_others_and_goes_to_the_disk(rig: Rig) -> None:
    on_disk(rig, PROMPT)
    lose_on_disk(rig, PROMPT, slice(None))
    assert rig.prefetch("r", PROMPT) == N_PAGES * PAGE_SIZE
    assert rig.disk.n_read_calls == 0
    request = rig.serve(PROMPT)
    assert request.n_host == N_PAGES * PAGE_SIZE
    rig.drain()
    assert rig.stored_pages(PROMPT) == N_PAGES
    rig.check_idle()
    rig.check_disk()


def test_one_prompt_from_both(rig: Rig) -> None:
    on_disk(rig, PROMPT)
    lose_on_disk(rig, PROMPT, slice(5, None))
    assert rig.prefetch("r", PROMPT) == N_PAGES * PAGE_SIZE
    assert rig.disk.n_read_calls == 1
    root = rig.hierarchy.root()
    path = rig.hierarchy.match(root, PROMPT).host
    assert [(node.n_pages, node.state(Tier.DISK)) for node in path] == [(5, RESIDENT), (3, ABSENT)]
    assert {node.state(Tier.STORE) for node in path[1:]} == {RESIDENT}
    rig.serve(PROMPT)
    rig.drain()
    rig.check_idle()


def test_another_server_has_computed_it(make_rig: MakeRig, blobs: SharedBlobs) -> None:
    first = make_rig(64, 32, new_disk(), remote=blobs)
    first.serve(PROMPT)
    first.drain()
    second = make_rig(64, 32, new_disk(), remote=blobs)
    assert second.prefetch("r", PROMPT) == N_PAGES * PAGE_SIZE
    assert second.serve(PROMPT).n_host == N_PAGES * PAGE_SIZE
    second.drain()
    second.check_idle()


def test_without_a_disk(make_rig: MakeRig, blobs: SharedBlobs) -> None:
    rig = make_rig(64, 32, None, remote=blobs)
    on_host(rig, PROMPT)
    rig.drop_from_host()
    assert rig.prefetch("r", PROMPT) == N_PAGES * PAGE_SIZE
    rig.serve(PROMPT)
    rig.drain()
    rig.check_idle()


@pytest.mark.parametrize("what", [name for name, _ in lies(SharedBlobs())])
def test_what_others_invent_is_computed(rig: Rig, blobs: SharedBlobs, what: str) -> None:
    on_disk(rig, PROMPT)
    lose_on_disk(rig, PROMPT, slice(3, None))
    blobs.lie = dict(lies(blobs))[what]
    n_tokens = rig.prefetch("r", PROMPT)
    assert n_tokens == 3 * PAGE_SIZE
    assert rig.serve(PROMPT).n_host == 3 * PAGE_SIZE  # the rig compares every byte
    blobs.lie = None
    rig.drain()
    assert rig.stored_pages(PROMPT) == N_PAGES
    rig.check_idle()


def test_what_others_forget_is_stored_again_when_it_is_computed_again(
    rig: Rig, blobs: SharedBlobs
) -> None:
    on_disk(rig, PROMPT)
    lose_on_disk(rig, PROMPT, slice(None))
    asked = blobs.exist

    def forget_between(keys: list[str]) -> list[bool]:
        found = asked(keys)
        blobs.forget()
        return found

    blobs.exist = forget_between  # type: ignore[method-assign, assignment]
    assert rig.prefetch("r", PROMPT) == 0
    blobs.exist = asked  # type: ignore[method-assign]
    rig.serve(PROMPT)
    rig.drain()
    assert (rig.stored_pages(PROMPT), n_blobs(rig, PROMPT)) == (N_PAGES, N_PAGES)
    rig.check_idle()


def test_a_store_that_fails_costs_nothing_but_itself(rig: Rig, blobs: SharedBlobs) -> None:
    for faults in (blobs.reads, blobs.writes, blobs.asks):
        faults.error = ConnectionError("no route")
    on_disk(rig, PROMPT)
    assert rig.prefetch("r", PROMPT) == N_PAGES * PAGE_SIZE
    other = tokens_of(50, 51)
    rig.serve(other)
    rig.drain()
    assert rig.stored_pages(other) == 2
    rig.check_idle()


def test_a_store_that_hangs_holds_up_neither_disk_nor_flush(rig: Rig, blobs: SharedBlobs) -> None:
    for faults in (blobs.reads, blobs.writes, blobs.asks):
        faults.hold()
    started = time.monotonic()
    for n in range(6):
        rig.serve(tokens_of(10 * n, 10 * n + 1, 10 * n + 2))
    rig.poll_until(lambda: rig.stored_pages(tokens_of(50, 51, 52)) == 3)
    rig.flush()
    assert time.monotonic() - started < 10.0
    rig.serve(PROMPT)
    rig.poll_until(lambda: rig.stored_pages(PROMPT) == N_PAGES)
    rig.check()
    blobs.release()
    rig.drain()
    rig.check_idle()


def test_who_waits_for_a_store_that_hangs_is_computed(rig: Rig, blobs: SharedBlobs) -> None:
    give_costs(rig)
    on_disk(rig, PROMPT)
    lose_on_disk(rig, PROMPT, slice(None))
    blobs.reads.hold()
    rig.arrive("r", PROMPT)
    prefetch = rig.hierarchy.prefetch
    started = time.monotonic()
    rig.poll_until(lambda: prefetch.done("r"))
    assert time.monotonic() - started < 5.0
    prefetch.release("r")
    assert rig.serve(PROMPT).n_host == 0
    blobs.reads.release()
    rig.drain()
    rig.check_idle()


def test_a_flush_keeps_what_is_on_its_way_to_both(rig: Rig, blobs: SharedBlobs) -> None:
    rig.disk.writes.hold()
    blobs.writes.hold()
    rig.serve(PROMPT)
    rig.poll_until(lambda: rig.writes.in_flight > 0 and far(rig).writes.queue.in_flight > 0)
    rig.flush()
    n_kept = rig.host.n_pages - rig.host.n_free
    assert n_kept == N_PAGES
    rig.check()
    rig.disk.writes.release()
    rig.poll_until(lambda: rig.writes.in_flight == 0)
    assert rig.host.n_pages - rig.host.n_free == N_PAGES, "the other one still needs them"
    rig.check()
    blobs.writes.release()
    rig.drain()
    assert rig.host.n_free == rig.host.n_pages
    assert (rig.stored_pages(PROMPT), n_blobs(rig, PROMPT)) == (N_PAGES, N_PAGES)
    rig.check_idle()


def test_a_cleared_disk_leaves_the_other_alone(rig: Rig) -> None:
    rig.serve(PROMPT)
    rig.drain()
    rig.hierarchy.forget_stored(Tier.DISK)
    rig.disk.clear_all()
    last = rig.hierarchy.match(rig.hierarchy.root(), PROMPT).last
    assert (last.state(Tier.DISK), last.state(Tier.STORE)) == (ABSENT, RESIDENT)
    rig.drop_from_device()
    rig.drop_from_host()
    assert rig.prefetch("r", PROMPT) == N_PAGES * PAGE_SIZE
    rig.check_idle()


def test_stores_that_were_put_away_are_neither_asked_nor_written(
    rig: Rig, blobs: SharedBlobs
) -> None:
    on_disk(rig, PROMPT)
    rig.hierarchy.put_stores_away()
    for faults in (blobs.reads, blobs.writes, blobs.asks):
        faults.error = AssertionError("asked")  # type: ignore[assignment]
    assert rig.prefetch("r", PROMPT) == 0
    rig.serve(tokens_of(70, 71))
    rig.drain()
    assert len(rig.disk) == N_PAGES
    rig.check_idle()


def test_a_disk_in_memory_of_limited_size(make_rig: MakeRig, blobs: SharedBlobs) -> None:
    """What the disk gives up for want of room is read from the others."""
    rig = make_rig(64, 32, new_disk(InMemoryStore(capacity_bytes=6 * 4096)), remote=blobs)
    prompts = [tokens_of(*range(n, n + 4), tail=1) for n in (10, 20, 30)]
    for prompt in prompts:
        rig.serve(prompt)
        rig.drain()
    assert rig.stored_pages(prompts[0]) == 0
    rig.drop_from_device()
    rig.drop_from_host()
    assert rig.prefetch("r", prompts[0]) == 4 * PAGE_SIZE
    assert rig.serve(prompts[0]).n_host == 4 * PAGE_SIZE
    rig.drain()
    rig.check_idle()


@pytest.fixture
def ranks(blobs: SharedBlobs) -> Iterator[Ranks]:
    made = Ranks(blobs)
    yield made
    made.barrier.abort()
    for rig in made:
        rig.close()


def only_in_blobs(ranks: Ranks, prompt: array[int]) -> None:
    """It was computed long ago."""
    ranks.serve(prompt)
    ranks.drain()
    ranks.each(Rig.drop_from_device)
    ranks.each(Rig.drop_from_host)
    for rig in ranks:
        rig.disk.clear_all()
        rig.disk.drain_dropped()


def read_on_both(ranks: Ranks, prompt: array[int]) -> list[int]:
    """Pages that came, on each rank."""
    ranks.each(lambda rig: rig.arrive("r", prompt))
    deadline = time.monotonic() + 10.0
    while not all(ranks.each(lambda rig: rig.hierarchy.prefetch.is_settled("r"))):
        assert time.monotonic() < deadline
        ranks.each(lambda rig: rig.hierarchy.poll())
    came = ranks.each(lambda rig: rig.hierarchy.prefetch.loaded_tokens("r") // PAGE_SIZE)
    ranks.each(lambda rig: rig.hierarchy.prefetch.release("r"))
    return came


def test_ranks_read_what_both_of_them_have(ranks: Ranks) -> None:
    only_in_blobs(ranks, PROMPT)
    hashes = ranks.each(lambda rig: rig.hashes(rig.hierarchy.root(), PROMPT))[1]
    far_store = far(ranks.rigs[1]).last_store
    assert isinstance(far_store, ObjectStore)
    for key in far_store._keys(hashes[5:]):
        del ranks.rigs[1].remote.blobs[key]  # type: ignore[union-attr]
    assert read_on_both(ranks, PROMPT) == [5, 5]
    ranks.serve(PROMPT)
    ranks.drain()
    ranks.each(Rig.check_idle)


def test_a_lookup_that_fails_on_one_rank_is_a_miss_on_both(ranks: Ranks) -> None:
    prompt = tokens_of(*range(1, INLINE_LOOKUP_PAGES + 10), tail=1)
    only_in_blobs(ranks, prompt)
    disk = ranks.rigs[1].disk

    def fail(hashes: object) -> int:
        raise OSError("the index is gone")

    disk.count_prefix = fail
    first, second = read_on_both(ranks, prompt)
    assert first == second > INLINE_LOOKUP_PAGES // 2, "the other store was asked all the same"
    ranks.check()


def test_stores_are_put_away_while_a_long_prompt_waits(rig: Rig) -> None:
    prompt = tokens_of(*range(1, INLINE_LOOKUP_PAGES + 10), tail=1)
    hierarchy = rig.hierarchy
    assert hierarchy.prefetch.lookups.ask("r", hierarchy.root(), prompt, hierarchy.root()) is None
    hierarchy.put_stores_away()
    found = hierarchy.prefetch.lookups.ask("r", hierarchy.root(), prompt, hierarchy.root())
    assert found is not None
    assert found.end == 0
