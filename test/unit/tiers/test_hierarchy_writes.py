"""Pages on their way down: device -> host -> disk, with slow and full tiers.

Every page's bytes are a function of its chained hash, so "the right bytes" is checked everywhere:
by each request's layers as they read their prefix, and over all tiers by `Rig.check`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from support_tiers.tier_rig import Rig, new_disk, tokens_of
from tiered_kv.core.ids import Tier
from tiered_kv.forest.residency import Residency
from tiered_kv.memory import write_through
from tiered_kv.tiers.in_memory import InMemoryStore

pytestmark = pytest.mark.timeout(60)

MakeRig = Callable[..., Rig]
RESIDENT, WRITING_BACK = Residency.RESIDENT, Residency.WRITING_BACK


def states(rig: Rig, tier: Tier) -> list[Residency]:
    """Of all nodes, from the roots down."""
    return [node.state(tier) for node in sorted(rig.forest.nodes(), key=lambda n: n.end)]


def test_a_served_prompt_reaches_host_and_disk(make_rig: MakeRig) -> None:
    rig = make_rig(disk=new_disk())
    prompt = tokens_of(1, 2, 3, tail=2)
    rig.serve(prompt)
    rig.drain()
    (node,) = rig.forest.nodes()
    assert [node.state(tier) for tier in rig.forest.tiers] == [RESIDENT] * 3
    assert rig.stored_pages(prompt) == 3
    assert rig.events.moved == [(Tier.DEVICE, Tier.HOST, 3), (Tier.HOST, Tier.DISK, 3)]
    rig.check_idle()
    rig.check_disk()


def test_a_prefix_in_use_stays_on_disk_though_it_is_never_read_from_there(
    make_rig: MakeRig,
) -> None:
    rig = make_rig(disk=new_disk(InMemoryStore(capacity_bytes=6 * 4096)))
    for turn in range(10):
        rig.serve(tokens_of(1, 2, 1000 + turn))  # never pushed out of the device
        rig.drain()
        rig.serve(tokens_of(*range(100 + 3 * turn, 103 + 3 * turn)))
        rig.drain()
    assert rig.stored_pages(tokens_of(1, 2)) == 2
    assert rig.stored_pages(tokens_of(100, 101, 102)) == 0


def test_a_page_is_written_once(make_rig: MakeRig) -> None:
    rig = make_rig(disk=new_disk())
    for n_pages in (2, 4, 4, 3):
        rig.serve(tokens_of(*range(n_pages), tail=1))
        rig.drain()
    assert sum(n for _, target, n in rig.events.moved if target is Tier.HOST) == 4
    assert sum(n for _, target, n in rig.events.moved if target is Tier.DISK) == 4


def test_chunks_are_written_while_the_request_runs(make_rig: MakeRig) -> None:
    rig = make_rig(disk=new_disk())
    request = rig.admit(tokens_of(1, 2, 3, 4))
    assert request is not None
    rig.stash(request, 8)
    rig.drain()
    assert rig.stored_pages(request.tokens) == 2
    rig.stash(request)
    rig.finish(request)
    rig.drain()
    assert rig.stored_pages(request.tokens) == 4
    rig.check_idle()


def test_without_a_disk_nothing_waits_for_one(make_rig: MakeRig) -> None:
    rig = make_rig(disk=None)
    rig.serve(tokens_of(1, 2))
    rig.drain()
    assert states(rig, Tier.HOST) == [RESIDENT]
    rig.check_idle()


# -- nodes that change under way -------------------------------------------------------------------


def test_a_node_split_while_it_is_copied_to_the_host(make_rig: MakeRig) -> None:
    rig = make_rig(disk=new_disk())
    rig.copier.down.hold()
    rig.serve(tokens_of(1, 2, 3, 4))
    rig.serve(tokens_of(1, 2, 8))
    rig.check()
    assert states(rig, Tier.HOST)[:2] == [WRITING_BACK, WRITING_BACK]
    rig.copier.down.release()
    rig.drain()
    assert states(rig, Tier.HOST) == states(rig, Tier.DISK) == [RESIDENT] * 3
    rig.check_idle()
    rig.check_disk()


def test_a_node_split_while_it_is_written_to_disk(make_rig: MakeRig) -> None:
    rig = make_rig(disk=new_disk())
    rig.disk.writes.hold()
    rig.serve(tokens_of(1, 2, 3, 4))
    rig.poll_until(lambda: states(rig, Tier.DISK) == [WRITING_BACK])
    rig.usable(tokens_of(1, 2))
    assert states(rig, Tier.DISK) == [WRITING_BACK] * 2
    rig.check()
    rig.disk.writes.release()
    rig.drain()
    assert states(rig, Tier.DISK) == [RESIDENT] * 2
    rig.check_idle()
    rig.check_disk()


def test_eviction_waits_for_the_copies_that_hold_pages(make_rig: MakeRig) -> None:
    """Running out of device slots is fatal to the engine, and copies are short."""
    rig = make_rig()
    rig.copier.down.hold()
    prompt = tokens_of(1, 2, 3)
    rig.serve(prompt)
    assert rig.meanwhile(lambda: rig.hierarchy.evict_device(8), rig.copier.down) == 8
    assert rig.usable(prompt) == (1, 2)
    rig.drain()
    rig.check_idle()


def test_eviction_does_not_wait_if_other_pages_will_do(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.serve(tokens_of(1, 2))
    rig.drain()
    rig.copier.down.hold()
    rig.serve(tokens_of(5, 6))
    assert rig.hierarchy.evict_device(8) == 8
    assert rig.usable(tokens_of(5, 6)) == (2, 0)
    rig.copier.down.release()
    rig.drain()
    rig.check_idle()


def test_locked_pages_are_not_evicted(make_rig: MakeRig) -> None:
    rig = make_rig()
    request = rig.admit(tokens_of(1, 2, 3))
    assert request is not None
    rig.stash(request)
    rig.drain()
    assert rig.hierarchy.evict_device(100) == 0
    rig.finish(request)
    assert rig.hierarchy.evict_device(100) == 12
    rig.check_idle()


# -- little room -----------------------------------------------------------------------------------


def test_a_prompt_larger_than_the_host_pool_streams_through_it_to_the_disk(
    make_rig: MakeRig,
) -> None:
    rig = make_rig(32, 8, new_disk())
    prompt = tokens_of(*range(1, 21))
    rig.serve(prompt)
    rig.drain()
    assert rig.stored_pages(prompt) == 20
    rig.check_disk()
    rig.drop_from_device()
    # Its head stayed on the host, the others made room for each other.
    assert 4 <= rig.usable(prompt)[1] <= 8
    rig.check_idle()
    rig.serve(prompt)
    rig.drain()
    assert rig.stored_pages(prompt) == 20
    rig.check_idle()


def test_without_a_disk_such_a_prompt_leaves_its_head_on_the_host(make_rig: MakeRig) -> None:
    rig = make_rig(32, 8)
    prompt = tokens_of(*range(1, 21))
    rig.serve(prompt)
    rig.drain()
    rig.drop_from_device()
    assert rig.usable(prompt)[1] >= 6
    rig.check_idle()


def test_what_waits_is_written_behind_a_flush(make_rig: MakeRig) -> None:
    """Disk writes in flight may hold half of the host pool: the others wait for them."""
    rig = make_rig(64, 16, new_disk())
    prompts = [tokens_of(*range(n, n + 6)) for n in (10, 20)]
    rig.disk.writes.hold()
    for prompt in prompts:
        rig.serve(prompt)
        rig.poll_until(lambda: rig.hierarchy.write_back.to_host.in_flight == 0)
    assert rig.hierarchy.write_back.n_deferred > 0
    rig.flush()
    assert rig.host.n_free == 4
    rig.disk.writes.release()
    rig.drain()
    assert [rig.stored_pages(prompt) for prompt in prompts] == [6, 6]
    assert rig.host.n_free == 16
    rig.check_idle()


def test_what_is_left_of_a_node_that_waits_is_written(make_rig: MakeRig) -> None:
    """It is split, and its lower half, which alone is in the list, is evicted before its turn."""
    rig = make_rig(32, 32, new_disk())
    rig.disk.writes.hold()
    blocker, prompt = tokens_of(*range(50, 66)), tokens_of(*range(1, 7))
    rig.serve(blocker)
    rig.poll_until(lambda: rig.writes.in_flight > 0)
    rig.serve(prompt)
    rig.poll_until(lambda: rig.hierarchy.write_back.to_host.in_flight == 0)
    assert rig.hierarchy.write_back.n_deferred > 0
    rig.drop_from_device()
    rig.context.evict_host(2)
    assert rig.usable(prompt) == (0, 4)
    rig.disk.writes.release()
    rig.drain()
    assert rig.stored_pages(prompt) == 4
    rig.check_idle()


def test_the_most_valuable_is_written_first(make_rig: MakeRig) -> None:
    rig = make_rig(64, 32, new_disk())
    rig.disk.writes.hold()
    rig.serve(tokens_of(*range(50, 66)))
    rig.poll_until(lambda: rig.writes.in_flight > 0)
    seldom, often = tokens_of(1, 2, tail=1), tokens_of(3, 4, tail=1)
    for prompt in (seldom, often, often, often):
        rig.serve(prompt)
    rig.poll_until(lambda: rig.hierarchy.write_back.to_host.in_flight == 0)
    written = rig.disk.namespace.write_pages
    order: list[bytes] = []

    def write_pages(hashes: Any, buffers: Any) -> int:
        order.extend(hashes)
        return int(written(hashes, buffers))

    rig.disk.namespace.write_pages = write_pages
    rig.disk.writes.release()
    rig.drain()
    root = rig.hierarchy.root()
    names = [rig.hashes(root, prompt)[0] for prompt in (often, seldom)]
    assert [page_hash for page_hash in order if page_hash in names] == names


def test_a_host_pool_full_of_what_is_used_takes_new_pages_later(make_rig: MakeRig) -> None:
    """Host pages held by slow disk writes: what finds no room waits, and is written in the end."""
    rig = make_rig(32, 8, new_disk())
    rig.disk.writes.hold()
    prompts = [tokens_of(n, n + 1, n + 2) for n in (10, 20, 30)]
    for prompt in prompts[:2]:
        rig.serve(prompt)
        rig.poll_until(lambda: rig.hierarchy.write_back.to_host.in_flight == 0)
    # One write is under way, the second waits: both are not to be evicted for the third.
    rig.forest.pin(rig.hierarchy.match(rig.hierarchy.root(), prompts[1]).last, Tier.HOST)
    rig.serve(prompts[2])
    for _ in range(5):
        rig.hierarchy.poll()
    assert rig.hierarchy.write_back.n_deferred > 0
    rig.check()
    rig.disk.writes.release()
    rig.poll_until(lambda: rig.stored_pages(prompts[2]) == 3)
    rig.forest.unpin(rig.hierarchy.match(rig.hierarchy.root(), prompts[1]).last, Tier.HOST)
    rig.drain()
    rig.check_idle()


def test_disk_writes_in_flight_hold_a_bounded_share_of_the_host(make_rig: MakeRig) -> None:
    rig = make_rig(64, 16, new_disk())
    rig.disk.writes.hold()
    for n in range(8):
        rig.serve(tokens_of(100 + n, 200 + n))
        rig.poll_until(lambda: rig.hierarchy.write_back.to_host.in_flight == 0)
        assert rig.writes.pages_in_flight <= 8
    # The last ones pushed out the first that were not under way: the host goes on taking pages.
    assert rig.host.n_free == 0
    assert rig.usable(tokens_of(107, 207)) == (2, 0)
    assert rig.forest.evictable_tokens(Tier.HOST) == 8 * rig.page_size
    rig.check()
    rig.disk.writes.release()
    rig.drain()
    rig.check_idle()
    rig.check_disk()


def test_the_list_of_what_waits_is_bounded(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_through, "MAX_DEFERRED", 3)
    rig = make_rig(64, 4, new_disk())
    rig.copier.down.hold()
    for n in range(12):
        rig.serve(tokens_of(100 + n))
    assert rig.hierarchy.write_back.to_host.in_flight == 4
    assert rig.hierarchy.write_back.n_deferred == 3
    rig.copier.down.release()
    rig.drain()
    rig.check_idle()


def test_what_can_not_fit_evicts_nothing(make_rig: MakeRig) -> None:
    rig = make_rig(64, 8)
    old, busy, new = tokens_of(1), tokens_of(20, 21, 22, 23, 24), tokens_of(9, 8, 7, 6)
    rig.serve(old)
    rig.serve(busy)
    rig.drain()
    used = rig.hierarchy.match(rig.hierarchy.root(), busy).last
    rig.forest.pin(used, Tier.HOST)
    rig.serve(new)
    rig.poll_until(lambda: rig.hierarchy.write_back.to_host.in_flight == 0)
    rig.hierarchy.poll()
    # Two of its pages fit into what was free. The other two would not, with `old` gone or not.
    assert rig.hierarchy.match(rig.hierarchy.root(), old).last.state(Tier.HOST) is RESIDENT
    assert rig.hierarchy.write_back.n_deferred == 1
    rig.forest.unpin(used, Tier.HOST)
    rig.drain()
    rig.drop_from_device()
    assert rig.usable(new) == (0, 4)
    rig.check_idle()


# -- shutting down ---------------------------------------------------------------------------------


def test_close_lets_what_waits_reach_the_disk(make_rig: MakeRig) -> None:
    rig = make_rig(64, 16, new_disk())
    rig.copier.down.delay = rig.disk.writes.delay = lambda: 0.002
    prompts = [tokens_of(n, n + 1, n + 2) for n in (10, 20, 30, 40, 50)]
    for prompt in prompts:
        rig.serve(prompt)
    assert rig.in_flight > 0
    rig.hierarchy.close(timeout_s=20.0)
    assert [rig.stored_pages(prompt) for prompt in prompts] == [3] * 5
    rig.check_disk()


def test_close_does_not_wait_for_a_disk_that_hangs(make_rig: MakeRig) -> None:
    rig = make_rig(disk=new_disk())
    rig.disk.writes.hold()
    for n in range(5):
        rig.serve(tokens_of(n))
    rig.meanwhile(lambda: rig.hierarchy.close(timeout_s=0.3, end_s=0.05))
    assert len(rig.disk) == 0
