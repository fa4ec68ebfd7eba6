"""Swapping a request's own pages out and back: the same bytes, and no page lost on any way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from support_tiers.tier_rig import Rig, on_host, tokens_of
from tiered_kv.tiers.swap import Swapped

pytestmark = pytest.mark.timeout(60)

MakeRig = Callable[..., Rig]


def own_pages(rig: Rig, n_pages: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Slots outside the tree with random KV in them, and a copy of that KV."""
    slots = rig.allocator.alloc(n_pages * rig.page_size)
    assert slots is not None
    for buffer in rig.buffers:
        buffer[slots] = torch.randn(len(slots), 2, 4).to(buffer.dtype)
    return slots, [buffer[slots].clone() for buffer in rig.buffers]


def scribble(rig: Rig, slots: torch.Tensor) -> None:
    for buffer in rig.buffers:
        buffer[slots] = 7.0


def poll_until_state(rig: Rig, rid: str, state: Swapped | None) -> None:
    rig.poll_until(lambda: rig.hierarchy.swap.state(rid) is state)


def test_out_and_back(make_rig: MakeRig) -> None:
    rig = make_rig()
    swap = rig.hierarchy.swap
    slots, kv = own_pages(rig, 3)
    assert swap.swap_out("r", slots)
    poll_until_state(rig, "r", Swapped.AWAY)
    scribble(rig, slots)
    rig.allocator.free(slots)
    rig.serve(tokens_of(1, 2, 3))  # takes the pages meanwhile
    rig.drain()
    new = swap.swap_in("r")
    assert new is not None
    poll_until_state(rig, "r", Swapped.BACK)
    for buffer, expected in zip(rig.buffers, kv, strict=True):
        assert torch.equal(buffer[new], expected)
    swap.forget("r")
    assert swap.state("r") is None
    rig.allocator.free(new)
    rig.check_idle()


def test_swapped_pages_are_not_evicted_but_cache_makes_room_for_them(make_rig: MakeRig) -> None:
    rig = make_rig(n_device_pages=64, n_host_pages=8)
    prompt = tokens_of(1, 2, 3, 4, 5, 6, 7, 8)
    on_host(rig, prompt)
    slots, _ = own_pages(rig, 4)
    assert rig.hierarchy.swap.swap_out("r", slots)
    poll_until_state(rig, "r", Swapped.AWAY)
    assert rig.usable(prompt) == (0, 4)
    rig.drop_from_host()
    assert rig.hierarchy.swap.n_swapped_pages == 4
    assert rig.host.n_free == 4
    rig.hierarchy.swap.forget("r")
    rig.allocator.free(slots)
    rig.check_idle()


def test_no_more_than_their_share_of_the_host(make_rig: MakeRig) -> None:
    rig = make_rig(n_device_pages=32, n_host_pages=8)
    slots, _ = own_pages(rig, 5)
    assert not rig.hierarchy.swap.swap_out("r", slots)
    assert rig.hierarchy.swap.swap_out("r", slots[: 4 * rig.page_size])
    assert not rig.hierarchy.swap.swap_out("other", slots[4 * rig.page_size :])
    rig.drain()
    rig.hierarchy.swap.forget("r")
    rig.allocator.free(slots)
    rig.check_idle()


def test_the_way_back_makes_room_on_the_device_or_waits(make_rig: MakeRig) -> None:
    rig = make_rig(n_device_pages=6, n_host_pages=32)
    swap = rig.hierarchy.swap
    slots, _ = own_pages(rig, 3)
    assert swap.swap_out("r", slots)
    poll_until_state(rig, "r", Swapped.AWAY)
    rig.allocator.free(slots)
    others, _ = own_pages(rig, 5)
    assert swap.swap_in("r") is None
    assert swap.state("r") is Swapped.AWAY
    rig.allocator.free(others)
    rig.serve(tokens_of(1, 2, 3, 4, 5))
    rig.drain()
    new = swap.swap_in("r")  # what is cached makes room
    assert new is not None
    poll_until_state(rig, "r", Swapped.BACK)
    swap.forget("r")
    rig.allocator.free(new)
    rig.check_idle()


def test_a_copy_out_that_fails_leaves_the_pages_where_they_were(make_rig: MakeRig) -> None:
    rig = make_rig()
    slots, kv = own_pages(rig, 2)
    rig.copier.down.error = OSError("the bus is gone")
    assert rig.hierarchy.swap.swap_out("r", slots)
    poll_until_state(rig, "r", None)
    assert torch.equal(rig.buffers[0][slots], kv[0])
    rig.allocator.free(slots)
    rig.check_idle()


def test_a_copy_back_that_fails_can_be_repeated(make_rig: MakeRig) -> None:
    rig = make_rig()
    swap = rig.hierarchy.swap
    slots, kv = own_pages(rig, 2)
    assert swap.swap_out("r", slots)
    poll_until_state(rig, "r", Swapped.AWAY)
    rig.allocator.free(slots)
    rig.copier.up.errors_to_come.append(OSError("the bus is gone"))
    assert swap.swap_in("r") is not None
    poll_until_state(rig, "r", Swapped.AWAY)
    assert rig.allocator.available() == rig.allocator.n_pages * rig.page_size
    new = swap.swap_in("r")
    assert new is not None
    poll_until_state(rig, "r", Swapped.BACK)
    assert torch.equal(rig.buffers[0][new], kv[0])
    swap.forget("r")
    rig.allocator.free(new)
    rig.check_idle()


def test_a_request_that_is_over_while_its_pages_leave(make_rig: MakeRig) -> None:
    rig = make_rig()
    swap = rig.hierarchy.swap
    slots, _ = own_pages(rig, 2)
    rig.copier.down.hold()
    assert swap.swap_out("r", slots)
    swap.forget("r")
    assert swap.n_swapped_pages == 2, "the copy still writes into them"
    assert swap.swap_out("r", slots), "the name is free"
    rig.copier.down.release()
    poll_until_state(rig, "r", Swapped.AWAY)
    assert swap.n_swapped_pages == 2
    swap.forget("r")
    rig.allocator.free(slots)
    rig.check_idle()


def test_a_request_that_is_over_while_its_pages_return(make_rig: MakeRig) -> None:
    rig = make_rig()
    swap = rig.hierarchy.swap
    slots, _ = own_pages(rig, 2)
    assert swap.swap_out("r", slots)
    poll_until_state(rig, "r", Swapped.AWAY)
    rig.allocator.free(slots)
    rig.copier.up.hold()
    assert swap.swap_in("r") is not None
    swap.forget("r")
    rig.copier.up.release()
    rig.drain()
    assert swap.n_swapped_pages == 0
    rig.check_idle()


def test_misuse_is_refused(make_rig: MakeRig) -> None:
    rig = make_rig()
    slots, _ = own_pages(rig, 2)
    with pytest.raises(ValueError, match="whole pages"):
        rig.hierarchy.swap.swap_out("r", slots[:-1])
    assert rig.hierarchy.swap.swap_out("r", slots)
    assert not rig.hierarchy.swap.swap_out("r", slots)
    with pytest.raises(ValueError, match="not away"):
        rig.hierarchy.swap.swap_in("r")
    rig.drain()
    rig.hierarchy.swap.forget("r")
    rig.allocator.free(slots)
    rig.check_idle()
