"""On a device with streams nobody waits who need not, and a copy that fails costs what it brings.

That what is read is there is shown by test/property/test_copy_order.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from support_tiers.overlap_history import PROMPTS
from support_tiers.stream_rig import StreamRig
from support_tiers.tier_rig import Request, on_host
from tiered_kv.core.ids import Tier
from tiered_kv.forest.residency import Residency

pytestmark = pytest.mark.timeout(60)

PROMPT, _, LONGER, OTHER, *_ = PROMPTS


class Held:
    """Everything is done at once until it is held: then nobody moves, and who waits fails."""

    is_held = False

    def choose(self, ready: Sequence[str], *, forced: bool) -> str | None:
        if not self.is_held:
            return ready[0]
        assert not forced, "the host waits for the device"
        return None


MakeRig = Callable[..., tuple[StreamRig, Held]]


@pytest.fixture(params=["dma", "kernel"])
def make_rig(request: pytest.FixtureRequest) -> Iterator[MakeRig]:
    made: list[tuple[StreamRig, Held]] = []

    def make(**sizes: Any) -> tuple[StreamRig, Held]:
        held = Held()
        sizes = {"n_device_pages": 32, "n_host_pages": 32} | sizes
        made.append((StreamRig(held, path=request.param, **sizes), held))
        return made[-1]

    yield make
    for rig, held in made:
        held.is_held = False
        rig.close()


def end(rig: StreamRig, held: Held) -> None:
    """The device goes on, every request ends, and everything is where it should be."""
    held.is_held = False
    for request in list(rig.requests):
        rig.decode(request)
        rig.finish(request)
    rig.settle()
    rig.check_idle()


def computed_alone(rig: StreamRig, prompt: Any) -> Request:
    """A request that has computed what the host has, too."""
    own = rig.allocator.alloc(-(-len(prompt) // rig.page_size) * rig.page_size)
    assert own is not None
    root = rig.hierarchy.root()
    request = Request(prompt, root, root, own, 0, 0, 0)
    rig.requests.append(request)
    rig.forward(request)
    return request


def load_for_nobody(rig: StreamRig, prompt: Any) -> int:
    hierarchy = rig.hierarchy
    assert hierarchy.load_back.load(hierarchy.match(hierarchy.root(), prompt).last) is not None
    return hierarchy.load_back.start()


def test_loads_and_their_passes_are_launched_though_the_device_stands_still(
    make_rig: MakeRig,
) -> None:
    rig, held = make_rig()
    on_host(rig, PROMPT, LONGER)
    held.is_held = True
    for prompt in (PROMPT, LONGER):
        request = rig.admit(prompt)
        assert request is not None
        assert request.n_host > 0
        rig.decode(request)
    rig.check()
    assert not rig.device.streams["to-device"]._n_done
    end(rig, held)


def test_an_insert_over_pages_being_loaded_waits_for_nobody(make_rig: MakeRig) -> None:
    rig, held = make_rig()
    on_host(rig, PROMPT)
    request = computed_alone(rig, PROMPT)
    held.is_held = True
    load_for_nobody(rig, PROMPT)
    (node,) = rig.forest.nodes()
    assert node.state(Tier.DEVICE) is Residency.LOADING
    rig.stash(request)
    rig.decode(request)
    assert node.state(Tier.DEVICE) is Residency.LOADING
    rig.check()
    end(rig, held)


def test_a_load_for_nobody_is_waited_for_by_those_that_read_its_pages(make_rig: MakeRig) -> None:
    rig, held = make_rig()
    on_host(rig, PROMPT)
    held.is_held = True
    assert load_for_nobody(rig, PROMPT) == -1
    unrelated = rig.admit(OTHER)
    assert unrelated is not None
    assert unrelated.gate_index == -1
    related = rig.admit(PROMPT)
    assert related is not None
    assert related.gate_index == 0
    end(rig, held)


def test_each_thread_that_copies_chooses_the_device_first(make_rig: MakeRig) -> None:
    rig, held = make_rig()
    assert rig.device.n_threads_with_device == 0
    on_host(rig, PROMPT)
    rig.admit(PROMPT)
    assert rig.device.n_threads_with_device == 2
    end(rig, held)


@pytest.mark.parametrize("n_calls", range(4))
def test_a_load_that_cannot_be_asked_for_costs_its_request_another_try(
    make_rig: MakeRig, n_calls: int
) -> None:
    """As when the device has no memory left: nothing ends but the pass."""
    rig, held = make_rig()
    on_host(rig, PROMPT)
    rig.device.calls_until_failure["to-device"] = n_calls
    assert rig.admit(PROMPT) is None
    again = rig.admit(PROMPT)
    assert again is not None
    assert again.n_host == 0, "the next attempt is left out"
    end(rig, held)
    rig.drop_from_device()
    rig.later(10.0)
    loaded = rig.admit(PROMPT)
    assert loaded is not None
    assert loaded.n_host == 16
    end(rig, held)


def test_without_memory_for_the_indices_either(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, held = make_rig()
    on_host(rig, PROMPT)

    def no_memory() -> None:
        raise MemoryError("the device has no memory left")

    with monkeypatch.context() as patch:
        patch.setattr(rig.context, "order_after", no_memory)
        assert rig.hierarchy.load_back.load(rig.hierarchy.match(rig.hierarchy.root(), PROMPT).last)
        assert rig.hierarchy.load_back.start() == -1
    rig.hierarchy.poll()
    assert rig.usable(PROMPT) == (0, 4)
    rig.later(10.0)
    loaded = rig.admit(PROMPT)
    assert loaded is not None
    assert loaded.n_host == 16
    end(rig, held)


@pytest.mark.parametrize("n_calls", range(2))
def test_a_write_that_cannot_be_asked_for_costs_the_copy(make_rig: MakeRig, n_calls: int) -> None:
    rig, held = make_rig()
    rig.device.calls_until_failure["to-host"] = n_calls
    rig.serve(PROMPT)
    rig.settle()
    assert rig.usable(PROMPT) == (4, 0)
    assert not rig.context.host.n_pages - rig.context.host.n_free
    assert rig.events.lost == {Tier.HOST: 4}
    rig.serve(PROMPT)
    end(rig, held)
    assert rig.context.host.n_pages - rig.context.host.n_free == 4


def test_a_copy_took_as_long_as_the_device_says(make_rig: MakeRig) -> None:
    rig, held = make_rig()
    on_host(rig, PROMPT)
    observed: list[float] = []
    queue = rig.hierarchy.load_back.queue
    queue.observe = lambda name, job, start_s, end_s, n: observed.append(end_s - start_s)
    rig.admit(PROMPT)
    # A millionth of a second for each thing that the device does, and it has done a few.
    assert observed
    assert 1e-6 <= observed[0] <= 30e-6
    end(rig, held)
