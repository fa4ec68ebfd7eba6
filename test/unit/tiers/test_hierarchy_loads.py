"""Pages on their way from host to device, under the forward pass that needs them.

Every request's layers compare their prefix's bytes behind the gate with what was computed for it,
so a test that serves a request also shows that it read the right pages, in time.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from support_tiers.tier_rig import N_LAYERS, Rig, new_disk, on_disk, on_host, tokens_of
from tiered_kv.core.ids import Tier
from tiered_kv.forest.residency import Residency

pytestmark = pytest.mark.timeout(60)

MakeRig = Callable[..., Rig]
LOADING = Residency.LOADING
PROMPT = tokens_of(1, 2, 3, 4, tail=1)


def test_device_to_host_to_device(make_rig: MakeRig) -> None:
    rig = make_rig()
    on_host(rig, PROMPT)
    assert rig.usable(PROMPT) == (0, 4)
    request = rig.serve(PROMPT)
    assert (request.n_device, request.n_host) == (0, 16)
    rig.drain()
    assert rig.usable(PROMPT) == (4, 0)
    rig.check_idle()


def test_only_what_the_device_lacks_is_loaded(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.serve(PROMPT)
    rig.drain()
    rig.hierarchy.evict_device(8)
    assert rig.usable(PROMPT) == (2, 2)
    request = rig.serve(PROMPT)
    assert (request.n_device, request.n_host) == (8, 8)
    rig.drain()
    rig.check_idle()


def test_a_request_reads_behind_the_gate_while_layers_are_still_copied(make_rig: MakeRig) -> None:
    rig = make_rig()
    on_host(rig, PROMPT)
    rig.copier.up.delay = lambda: 0.03
    request = rig.admit(PROMPT, run=False)
    assert request is not None
    assert request.gate_index >= 0
    (node,) = rig.forest.nodes()
    assert node.state(Tier.DEVICE) is LOADING
    rig.forward(request)
    rig.finish(request)
    rig.drain()
    rig.check_idle()


def test_two_requests_share_one_load(make_rig: MakeRig) -> None:
    rig = make_rig()
    on_host(rig, PROMPT)
    rig.copier.up.hold()
    first = rig.admit(PROMPT, run=False)
    second = rig.admit(PROMPT, run=False)
    assert first is not None
    assert second is not None
    assert (second.n_device, second.n_host) == (16, 0)
    assert second.gate_index == first.gate_index >= 0
    rig.check()
    rig.meanwhile(lambda: rig.forward(second), rig.copier.up)
    rig.forward(first)
    rig.finish(first)
    rig.finish(second)
    rig.drain()
    assert [m for m in rig.events.moved if m[1] is Tier.DEVICE] == [(Tier.HOST, Tier.DEVICE, 4)]
    rig.check_idle()


def test_a_batch_over_pages_of_an_older_load_waits_for_that_too(make_rig: MakeRig) -> None:
    rig = make_rig()
    other = tokens_of(7, 8, tail=1)
    on_host(rig, PROMPT, other)
    rig.copier.up.hold()
    first = rig.admit(PROMPT, run=False)
    newer = rig.admit(other, run=False)
    again = rig.admit(PROMPT, run=False)
    requests = [first, newer, again]
    assert newer.gate_index > first.gate_index  # type: ignore[union-attr]
    assert again.gate_index == newer.gate_index  # type: ignore[union-attr]
    rig.meanwhile(lambda: rig.forward(again), rig.copier.up)  # type: ignore[arg-type]
    for request in requests:
        assert request is not None
        rig.forward(request)
        rig.finish(request)
    rig.drain()
    rig.check_idle()


def test_several_loads_of_one_batch_are_one_job(make_rig: MakeRig) -> None:
    rig = make_rig()
    prompts = [tokens_of(1, 2, 3), tokens_of(1, 2, 9, 8), tokens_of(5, 6)]
    on_host(rig, *prompts)
    hierarchy = rig.hierarchy
    loaded = [
        hierarchy.load_back.load(hierarchy.match(hierarchy.root(), prompt).last)
        for prompt in prompts
    ]
    assert [len(run[0]) for run in loaded if run is not None] == [12, 8, 8]
    index = hierarchy.load_back.start()
    assert hierarchy.load_back.queue.in_flight == 1
    hierarchy.load_back.gate.set_consumer(index)
    hierarchy.load_back.gate.wait_until(N_LAYERS - 1)
    rig.drain()
    assert [rig.usable(prompt) for prompt in prompts] == [(3, 0), (4, 0), (2, 0)]
    rig.check_idle()


def test_a_load_whose_request_is_not_admitted_after_all_still_completes(make_rig: MakeRig) -> None:
    rig = make_rig()
    on_host(rig, PROMPT)
    prefix = rig.hierarchy.match(rig.hierarchy.root(), PROMPT)
    assert rig.hierarchy.load_back.load(prefix.last) is not None
    # The request did not fit into the batch, and was aborted: nobody calls `start`.
    rig.drain()
    assert rig.usable(PROMPT) == (4, 0)
    rig.check_idle()


def test_a_load_without_room_changes_nothing(make_rig: MakeRig) -> None:
    rig = make_rig(6, 32)
    on_host(rig, PROMPT)
    idle = tokens_of(20)
    rig.serve(idle)
    busy = rig.admit(tokens_of(30, 31, 32))
    assert busy is not None
    rig.drain()
    before = rig.forest.view()
    prefix = rig.hierarchy.match(rig.hierarchy.root(), PROMPT)
    assert rig.hierarchy.load_back.load(prefix.last) is None
    assert rig.hierarchy.load_back.start() == -1
    after = rig.forest.view()
    assert [n.states for n in after.nodes] == [n.states for n in before.nodes]
    assert [n.pins for n in after.nodes] == [n.pins for n in before.nodes]
    assert rig.usable(idle) == (1, 0)
    rig.finish(busy)
    rig.serve(PROMPT)
    rig.drain()
    rig.check_idle()


def test_a_load_makes_room_but_not_of_its_own_prefix(make_rig: MakeRig) -> None:
    rig = make_rig(6, 32)
    rig.serve(PROMPT)
    rig.drain()
    rig.hierarchy.evict_device(8)  # half of the prompt stays: the oldest pages on the device
    rig.serve(tokens_of(20, 21, 22))
    rig.drain()
    assert rig.usable(PROMPT) == (2, 2)
    prefix = rig.hierarchy.match(rig.hierarchy.root(), PROMPT)
    for node in prefix.device:
        node.last_access = 0
    loaded = rig.hierarchy.load_back.load(prefix.last)
    assert loaded is not None
    rig.check()
    rig.drain()
    assert rig.usable(PROMPT) == (4, 0)
    rig.check_idle()


def test_a_node_split_while_it_is_loaded(make_rig: MakeRig) -> None:
    rig = make_rig()
    on_host(rig, PROMPT)
    rig.copier.up.hold()
    request = rig.admit(PROMPT, run=False)
    assert request is not None
    assert rig.usable(tokens_of(1, 2)) == (2, 0)
    rig.check()
    rig.copier.up.release()
    rig.forward(request)
    rig.finish(request)
    rig.drain()
    assert rig.usable(PROMPT) == (4, 0)
    rig.check_idle()


def test_an_insert_over_pages_being_loaded_waits_for_them(make_rig: MakeRig) -> None:
    """The request then runs on with the tree's slots, which must hold the KV by then."""
    rig = make_rig()
    rig.serve(PROMPT)
    rig.drain()
    request = rig.admit(tokens_of(9))  # unrelated, to have something running
    computed = rig.admit(PROMPT)
    assert request is not None
    assert computed is not None
    rig.abort(computed)
    rig.drop_from_device()
    # `computed` again, but this time with slots of its own for the whole prompt: it was matched
    # before the pages came to the host, so to say.
    own = rig.allocator.alloc(20)
    assert own is not None
    computed.slots, computed.n_protected, computed.locked = own, 0, computed.root
    rig.requests.append(computed)
    rig.forward(computed)
    rig.copier.up.hold()
    loading = rig.admit(PROMPT, run=False)
    assert loading is not None
    assert loading.n_host == 16
    rig.meanwhile(lambda: rig.stash(computed), rig.copier.up)
    rig.check()
    rig.forward(computed)
    rig.forward(loading)
    for each in (request, computed, loading):
        rig.finish(each)
    rig.drain()
    rig.check_idle()


def test_eviction_waits_for_a_load_that_holds_pages(make_rig: MakeRig) -> None:
    rig = make_rig()
    on_host(rig, PROMPT)
    rig.copier.up.hold()
    request = rig.admit(PROMPT, run=False)
    assert request is not None
    rig.abort(request)
    assert rig.meanwhile(lambda: rig.hierarchy.evict_device(16), rig.copier.up) == 16
    rig.drain()
    rig.check_idle()


def test_a_prefix_that_left_the_host_before_it_was_loaded(make_rig: MakeRig) -> None:
    rig = make_rig()
    on_host(rig, PROMPT)
    prefix = rig.hierarchy.match(rig.hierarchy.root(), PROMPT)
    rig.drop_from_host()
    assert rig.hierarchy.load_back.load(prefix.last) is None
    rig.serve(PROMPT)
    rig.drain()
    rig.check_idle()


def test_host_pages_being_loaded_stay_until_they_are_on_the_device(make_rig: MakeRig) -> None:
    rig = make_rig(32, 6, new_disk())
    other = tokens_of(20, 21, 22)
    on_disk(rig, other)
    on_host(rig, PROMPT)
    rig.copier.up.hold()
    request = rig.admit(PROMPT, run=False)
    assert request is not None
    rig.drop_from_host()
    rig.prefetch("r", other)  # would overwrite them
    rig.check()
    rig.meanwhile(lambda: rig.forward(request), rig.copier.up)
    rig.finish(request)
    rig.drain()
    rig.check_idle()
