"""What one server leaves in a store for the others, and what it knows of what came from there.

Guarantee: what was used twice goes there, and what a server that stops holds; what the store
refused or lost is offered again.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from support_tiers.shared_blobs import SharedBlobs
from support_tiers.tier_rig import PAGE_SIZE, Rig, new_disk, on_disk, tokens_of
from support_tiers.two_stores import far, lose_on_disk, n_blobs
from tiered_kv.core.ids import Tier
from tiered_kv.forest.key import TreeKey
from tiered_kv.tiers.shared import object_store

pytestmark = pytest.mark.timeout(60)

MakeRig = Callable[..., Rig]
PROMPT = tokens_of(*range(1, 9), tail=1)
N_PAGES = 8


@pytest.mark.parametrize("writes", ["value", "none"])
def test_what_is_shared_is_what_was_used_twice(
    make_rig: MakeRig, blobs: SharedBlobs, writes: str
) -> None:
    rig = make_rig(64, 32, new_disk(), remote=blobs, store_writes=writes)
    rig.serve(PROMPT)
    rig.drain()
    assert (rig.stored_pages(PROMPT), n_blobs(rig, PROMPT)) == (N_PAGES, 0)
    rig.serve(PROMPT)
    rig.drain()
    assert n_blobs(rig, PROMPT) == (N_PAGES if writes == "value" else 0)
    rig.check_idle()


@pytest.mark.parametrize(("writes", "n_left"), [("value", N_PAGES), ("none", 0)])
def test_who_stops_leaves_what_he_has_to_the_others(
    make_rig: MakeRig, blobs: SharedBlobs, writes: str, n_left: int
) -> None:
    rig = make_rig(64, 32, new_disk(), remote=blobs, store_writes=writes)
    rig.serve(PROMPT)
    rig.serve(PROMPT, TreeKey(adapter=b"random", is_lasting=False))
    rig.drain()
    assert not blobs.blobs
    rig.hierarchy.close(5.0)
    assert len(blobs.blobs) == n_left
    other = make_rig(64, 32, new_disk(), remote=blobs, store_writes=writes)
    assert other.prefetch("r", PROMPT) == n_left * PAGE_SIZE


def test_a_store_that_was_emptied_gets_what_is_used_again(
    rig: Rig, blobs: SharedBlobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it is ever read there: all is on the device. It is noticed by use."""
    monkeypatch.setattr(object_store, "TOUCH_AGAIN_S", 0.5)
    rig.serve(PROMPT)
    rig.drain()
    assert n_blobs(rig, PROMPT) == N_PAGES
    blobs.forget()

    others = iter(range(100, 1000))

    def is_back() -> bool:
        rig.serve(PROMPT)
        rig.serve(tokens_of(next(others)))  # ranks agree when something is on its way
        rig.drain()
        return n_blobs(rig, PROMPT) == N_PAGES

    deadline = time.monotonic() + 10
    while not is_back():
        assert time.monotonic() < deadline, "the store stays empty"
        time.sleep(0.3)
    rig.check_idle()


def test_it_is_known_how_much_came_from_where(rig: Rig) -> None:
    on_disk(rig, PROMPT)
    lose_on_disk(rig, PROMPT, slice(5, None))
    assert rig.prefetch("r", PROMPT) == N_PAGES * PAGE_SIZE
    found = rig.hierarchy.prefetch.loaded_tokens_from
    assert found("nobody", Tier.STORE) == 0
    # (`rig.prefetch` has released its own.)
    rig.drop_from_device()
    rig.drop_from_host()
    rig.arrive("s", PROMPT)
    rig.poll_until(lambda: rig.hierarchy.prefetch.done("s"))
    assert found("s", Tier.DISK) == 5 * PAGE_SIZE
    assert found("s", Tier.STORE) == 3 * PAGE_SIZE
    rig.hierarchy.prefetch.release("s")


def test_what_a_store_refuses_for_a_moment_is_offered_again(
    make_rig: MakeRig, blobs: SharedBlobs
) -> None:
    """Nobody uses it a second time: others may."""
    rig = make_rig(64, 32, new_disk(), remote=blobs)
    blobs.takes = lambda _: False
    rig.serve(PROMPT)
    rig.poll_until(lambda: rig.stored_pages(PROMPT) == N_PAGES and rig.in_flight == 0)
    assert not blobs.blobs
    assert far(rig).writes.n_deferred == 1
    blobs.takes = lambda _: True
    rig.poll_until(lambda: n_blobs(rig, PROMPT) == N_PAGES)
    rig.drain()
    assert far(rig).writes.n_deferred == 0
    rig.check_idle()
