"""Pages on their way from disk to host, while the requests that need them wait.

What is read is compared with what was computed for it, on the host (`Rig.check`) and, once a
request is served, by its layers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from support_tiers.doubles import FaultyDisk
from support_tiers.tier_rig import NAMESPACE, Rig, new_disk, on_disk, on_host, tokens_of
from tiered_kv.core.ids import Tier
from tiered_kv.forest.key import TreeKey
from tiered_kv.forest.residency import Residency
from tiered_kv.tiers.disk.store import DiskStore
from tiered_kv.tiers.in_memory import InMemoryStore

pytestmark = pytest.mark.timeout(60)

MakeRig = Callable[..., Rig]
ABSENT, LOADING, RESIDENT = Residency.ABSENT, Residency.LOADING, Residency.RESIDENT
PROMPT = tokens_of(1, 2, 3, 4, tail=1)


def test_device_to_disk_to_host_to_device(make_rig: MakeRig) -> None:
    rig = make_rig(disk=new_disk())
    on_disk(rig, PROMPT)
    assert rig.usable(PROMPT) == (0, 0)
    assert rig.prefetch("r", PROMPT) == 16
    assert rig.usable(PROMPT) == (0, 4)
    assert rig.serve(PROMPT).n_host == 16
    rig.drain()
    rig.check_idle()


def test_restart(make_rig: MakeRig) -> None:
    """A new process over the same directory: nothing in memory, everything found by hash."""
    store = InMemoryStore()
    first = make_rig(disk=new_disk(store))
    longer = tokens_of(1, 2, 3, 4, 5, tail=3)
    first.serve(PROMPT)
    first.drain()
    first.hierarchy.close(5.0)
    second = make_rig(disk=new_disk(store))
    second.known_hashes = first.known_hashes
    assert second.prefetch("r", longer) == 16
    request = second.serve(longer)
    assert (request.n_device, request.n_host) == (0, 16)
    second.drain()
    assert second.stored_pages(longer) == 5
    # What came from disk is not written there again.
    assert [m for m in second.events.moved if m[1] is Tier.DISK] == [(Tier.HOST, Tier.DISK, 1)]
    second.check_idle()
    second.check_disk()


def test_restart_over_files(make_rig: MakeRig, tmp_path: Path) -> None:
    """The same with the real disk tier, which another process would have written."""
    page_bytes = make_rig().page_format.page_bytes
    with DiskStore.open(tmp_path / "disk", capacity_bytes=64 << 20) as store:
        first = make_rig(disk=store.namespace(NAMESPACE, page_bytes))
        first.serve(PROMPT)
        first.hierarchy.close(10.0)
    with DiskStore.open(tmp_path / "disk", capacity_bytes=64 << 20) as store:
        second = make_rig(disk=store.namespace(NAMESPACE, page_bytes))
        assert second.prefetch("r", PROMPT) == 16
        assert second.serve(PROMPT).n_host == 16
        second.drain()
        second.check_idle()
        second.check_disk()
        second.close()


def test_a_miss_leaves_no_ticket(make_rig: MakeRig) -> None:
    rig = make_rig(disk=new_disk())
    on_disk(rig, PROMPT)
    rig.arrive("other", tokens_of(9, 1, 2))
    rig.arrive("less than a page", PROMPT[:3])
    assert not rig.hierarchy.prefetch.tickets
    assert rig.hierarchy.prefetch.done("other")
    assert rig.hierarchy.prefetch.loaded_tokens("other") == 0
    assert rig.disk.n_read_calls == 0
    rig.hierarchy.prefetch.release("other")
    rig.check_idle()


def test_trees_of_other_keys_are_apart(make_rig: MakeRig) -> None:
    rig = make_rig(disk=new_disk())
    on_disk(rig, PROMPT)
    tenant = TreeKey(extra_key=b"tenant")
    rig.arrive("r", PROMPT, tenant)
    assert not rig.hierarchy.prefetch.tickets
    request = rig.admit(PROMPT, tenant)
    assert request is not None
    assert (request.n_device, request.n_host) == (0, 0)
    rig.finish(request)
    rig.drain()
    assert rig.stored_pages(PROMPT) == rig.stored_pages(PROMPT, tenant) == 4
    assert len(rig.disk) == 8
    rig.check_idle()
    rig.check_disk()


def test_pages_below_what_the_host_has(make_rig: MakeRig) -> None:
    rig = make_rig(disk=new_disk())
    on_host(rig, PROMPT)
    rig.context.evict_host(2)
    assert rig.usable(PROMPT) == (0, 2)
    assert rig.prefetch("r", PROMPT) == 8
    assert rig.usable(PROMPT) == (0, 4)
    rig.check_idle()


@pytest.mark.parametrize("n_pages", [0, 1, 2, 3])
def test_a_read_that_brings_only_some_pages(make_rig: MakeRig, n_pages: int) -> None:
    rig = make_rig(disk=new_disk())
    on_disk(rig, PROMPT)
    rig.disk.pages_per_read = n_pages
    rig.arrive("r", PROMPT)
    rig.poll_until(lambda: rig.hierarchy.prefetch.done("r"))
    assert rig.hierarchy.prefetch.loaded_tokens("r") == n_pages * 4
    assert rig.usable(PROMPT) == (0, n_pages)
    # What came stays for the request until it is admitted.
    rig.drop_from_host()
    assert rig.usable(PROMPT) == (0, n_pages)
    rig.check()
    request = rig.admit(PROMPT)
    assert request is not None
    assert request.n_host == n_pages * 4
    rig.hierarchy.prefetch.release("r")
    rig.finish(request)
    rig.drain()
    assert rig.usable(PROMPT) == (4, 0)
    rig.check_idle()


def test_a_read_that_raises(make_rig: MakeRig) -> None:
    rig = make_rig(disk=new_disk())
    on_disk(rig, PROMPT)
    rig.disk.reads.error = OSError("no such luck")
    assert rig.prefetch("r", PROMPT) == 0
    assert len(rig.forest) == 0
    assert rig.host.n_free == rig.host.n_pages
    rig.serve(PROMPT)
    rig.drain()
    rig.check_idle()


def test_two_requests_share_one_read(make_rig: MakeRig) -> None:
    rig = make_rig(disk=new_disk())
    on_disk(rig, PROMPT)
    rig.disk.reads.hold()
    rig.arrive("a", PROMPT)
    rig.arrive("b", PROMPT)
    prefetch = rig.hierarchy.prefetch
    assert not prefetch.done("a")
    assert not prefetch.done("b")
    rig.check()
    rig.disk.reads.release()
    rig.poll_until(lambda: prefetch.done("a") and prefetch.done("b"))
    assert rig.disk.n_read_calls == 1
    assert prefetch.loaded_tokens("a") == prefetch.loaded_tokens("b") == 16
    prefetch.release("a")
    rig.drop_from_host()
    assert rig.usable(PROMPT) == (0, 4), "b still needs them"
    prefetch.release("b")
    rig.drop_from_host()
    assert rig.usable(PROMPT) == (0, 0)
    rig.check_idle()


@pytest.mark.parametrize("n_first", [0, 1, 3, 4])
def test_a_request_that_needs_part_of_another_read_and_more(
    make_rig: MakeRig, n_first: int
) -> None:
    """b shares two of a's pages, then parts from it; a's read brings `n_first` pages."""
    rig = make_rig(disk=new_disk())
    other = tokens_of(1, 2, 8, 9, tail=1)
    on_disk(rig, PROMPT, other)
    rig.disk.reads.hold()
    rig.disk.reads_to_come.extend([n_first])
    rig.arrive("a", PROMPT)
    rig.arrive("b", other)
    rig.check()
    rig.disk.reads.release()
    prefetch = rig.hierarchy.prefetch
    rig.poll_until(lambda: prefetch.done("a") and prefetch.done("b"))
    rig.check()
    n_shared = min(n_first, 2)
    assert rig.usable(PROMPT) == (0, n_first)
    assert rig.usable(other) == (0, n_shared if n_shared < 2 else 4)
    assert prefetch.loaded_tokens("a") == n_first * 4
    assert prefetch.loaded_tokens("b") == (n_shared if n_shared < 2 else 4) * 4
    rig.drop_from_host()
    assert rig.usable(PROMPT) == (0, n_first)
    prefetch.release("a")
    prefetch.release("b")
    rig.check_idle()
    for prompt in (PROMPT, other):
        rig.prefetch("again", prompt)
        rig.serve(prompt)
    rig.drain()
    rig.check_idle()


def test_prefetch_over_a_hole_above_pages_that_the_host_has(make_rig: MakeRig) -> None:
    """The read of the upper part failed, another request's below it worked: the host has a hole."""
    rig = make_rig(disk=new_disk())
    disk: FaultyDisk = rig.disk
    upper, whole = tokens_of(1, 2, 9), tokens_of(1, 2, 3, 4, 9)
    on_disk(rig, whole)
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


def test_a_node_split_while_it_is_read(make_rig: MakeRig) -> None:
    rig = make_rig(disk=new_disk())
    on_disk(rig, PROMPT)
    rig.disk.reads.hold()
    rig.disk.pages_per_read = 3
    rig.arrive("r", PROMPT)
    rig.usable(tokens_of(1, 2))
    rig.check()
    rig.disk.reads.release()
    rig.poll_until(lambda: rig.hierarchy.prefetch.done("r"))
    assert rig.usable(PROMPT) == (0, 3)
    rig.hierarchy.prefetch.release("r")
    rig.check_idle()


def test_a_request_that_gives_up_while_its_pages_are_read(make_rig: MakeRig) -> None:
    rig = make_rig(disk=new_disk())
    on_disk(rig, PROMPT)
    rig.disk.reads.hold()
    rig.arrive("r", PROMPT)
    rig.poll_until(lambda: rig.disk.n_read_calls == 1)
    rig.hierarchy.prefetch.release("r")
    rig.check()
    rig.disk.reads.release()
    rig.drain()
    assert rig.usable(PROMPT) == (0, 4)
    rig.check_idle()
    rig.drop_from_host()
    assert len(rig.forest) == 0


@pytest.mark.parametrize("n_read", [2, None])
def test_pages_computed_while_they_are_read(make_rig: MakeRig, n_read: int | None) -> None:
    """The device takes them as computed; the read completes, or not, beside it."""
    rig = make_rig(disk=new_disk())
    on_disk(rig, PROMPT)
    rig.disk.reads.hold()
    rig.disk.pages_per_read = n_read
    rig.arrive("r", PROMPT)
    rig.serve(PROMPT)
    (node,) = rig.forest.nodes()
    assert (node.state(Tier.DEVICE), node.state(Tier.HOST)) == (RESIDENT, LOADING)
    rig.check()
    rig.disk.reads.release()
    rig.drain()
    rig.hierarchy.prefetch.release("r")
    rig.check_idle()
    rig.serve(PROMPT)  # and what was not read is written when it is used again
    rig.drain()
    rig.drop_from_device()
    assert rig.usable(PROMPT) == (0, 4)
    rig.check_idle()


def test_more_than_the_share_comes_in_part(make_rig: MakeRig) -> None:
    rig = make_rig(64, 16, new_disk())
    prompt = tokens_of(*range(10, 22))
    on_host(rig, tokens_of(*range(10, 16)))
    on_host(rig, prompt)
    rig.drop_from_host()
    assert rig.stored_pages(prompt) == 12
    assert rig.prefetch("r", prompt) == 8 * 4
    assert rig.usable(prompt) == (0, 8)
    rig.serve(prompt)
    rig.drain()
    rig.check_idle()


def test_no_host_room_at_all(make_rig: MakeRig) -> None:
    """Everything on the host is in use: the request goes on without its pages."""
    rig = make_rig(64, 4, new_disk())
    on_disk(rig, PROMPT)
    rig.serve(tokens_of(20, 21, 22, 23))
    rig.drain()
    holder = rig.hierarchy.match(rig.hierarchy.root(), tokens_of(20, 21, 22, 23)).last
    rig.forest.pin(holder, Tier.HOST)
    rig.arrive("r", PROMPT)
    assert rig.hierarchy.prefetch.done("r")
    assert rig.hierarchy.prefetch.loaded_tokens("r") == 0
    rig.check()
    rig.forest.unpin(holder, Tier.HOST)
    rig.hierarchy.prefetch.release("r")
    rig.check_idle()


def test_prefetch_does_not_evict_the_path_it_continues(make_rig: MakeRig) -> None:
    rig = make_rig(64, 8, new_disk())
    on_disk(rig, PROMPT)
    assert rig.prefetch("r", PROMPT[:9]) == 8
    rig.serve(tokens_of(20, 21, 22, 23, 24, 25))
    rig.drain()
    assert rig.usable(tokens_of(1, 2))[1] == 2, "two pages of eight are left over"
    rig.arrive("s", PROMPT)
    rig.check()
    rig.poll_until(lambda: rig.hierarchy.prefetch.done("s"))
    assert rig.usable(PROMPT) == (0, 4)
    rig.hierarchy.prefetch.release("s")
    rig.check_idle()


def test_a_page_that_the_disk_lost_is_written_there_again(make_rig: MakeRig) -> None:
    """Its node, kept by what lies below it, must not go on claiming that the disk has it."""
    rig = make_rig(disk=new_disk())
    upper, whole = tokens_of(1, 2), tokens_of(1, 2, 3)
    rig.serve(upper)
    rig.drain()
    rig.drop_from_host()
    rig.copier.down.errors_to_come.extend([OSError("no such luck"), None])
    rig.serve(whole)
    rig.drain()
    rig.drop_from_device()
    node = rig.hierarchy.context.forest.match(rig.hierarchy.root(), upper).last
    assert [node.state(tier) for tier in rig.forest.tiers] == [ABSENT, ABSENT, RESIDENT]
    rig.disk.reads_to_come.extend([0])
    rig.prefetch("r", whole)
    assert node.state(Tier.DISK) is ABSENT
    rig.use(new_disk())  # nothing is there
    rig.serve(whole)
    rig.drain()
    assert rig.stored_pages(upper) == 2
    rig.check_idle()
