"""Loads that fail: who waited is told, nothing is served, and it is not for ever."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from support_tiers.tier_rig import N_LAYERS, Rig, on_host, tokens_of
from tiered_kv.forest.residency import Residency
from tiered_kv.memory.back_off import FIRST_S, LONGEST_S
from tiered_kv.memory.demand import DemandForecast, Expectation

pytestmark = pytest.mark.timeout(60)

MakeRig = Callable[..., Rig]
LOADING = Residency.LOADING
PROMPT = tokens_of(1, 2, 3, 4, tail=1)


@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_a_load_that_fails_costs_the_pass_that_waits_for_it(make_rig: MakeRig, layer: int) -> None:
    rig = make_rig()
    rig.stop_clock()
    on_host(rig, PROMPT)
    rig.copier.fail_at_layer = layer
    request = rig.admit(PROMPT, run=False)
    assert request is not None
    assert not rig.forward(request)
    rig.copier.fail_at_layer = None
    assert rig.usable(PROMPT) == (0, 4)
    rig.check_idle()
    again = rig.admit(PROMPT)
    assert again is not None
    assert (again.n_device, again.n_host) == (0, 0), "the next attempt is left out"
    rig.finish(again)
    rig.drain()
    rig.drop_from_device()
    rig.later(FIRST_S)
    loaded = rig.admit(PROMPT)
    assert loaded is not None
    assert loaded.n_host == 16
    rig.finish(loaded)
    rig.drain()
    rig.check_idle()


def test_loads_that_go_on_failing_are_tried_ever_more_seldom(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.stop_clock()
    on_host(rig, PROMPT)
    rig.copier.up.error = OSError("no such luck")
    for n in range(8):
        assert rig.admit(PROMPT) is None, "it is tried, and fails"
        rest_s = min(FIRST_S * 2**n, LONGEST_S)
        for _ in range(3):
            request = rig.admit(PROMPT)
            assert request is not None
            assert request.n_host == 0
            rig.abort(request)
        rig.later(rest_s + 1e-3)  # it is counted in whole microseconds
    rig.copier.up.error = None
    assert_loaded(rig)
    rig.copier.up.errors_to_come.append(OSError("once more"))
    assert rig.admit(PROMPT) is None
    rig.later(FIRST_S + 1e-3)
    assert_loaded(rig)
    rig.check_idle()


def assert_loaded(rig: Rig) -> None:
    loaded = rig.admit(PROMPT)
    assert loaded is not None
    assert loaded.n_host == 16
    rig.finish(loaded)
    rig.drain()
    rig.drop_from_device()


def test_however_often_loads_failed_a_quiet_server_uses_them_again(make_rig: MakeRig) -> None:
    """Nothing is in flight, and one request comes after a while."""
    rig = make_rig()
    on_host(rig, PROMPT)
    rig.copier.up.error = OSError("no such luck")
    for _ in range(12):
        assert rig.admit(PROMPT) is None
        rig.later(LONGEST_S)
    rig.copier.up.error = None
    assert_loaded(rig)
    rig.check_idle()


def test_a_failed_load_takes_those_that_build_on_it_along(make_rig: MakeRig) -> None:
    """A later batch that shares its pages waits for the newest load only."""
    rig = make_rig(48)
    longer, other = tokens_of(1, 2, 3, 4, 5, 6, tail=1), tokens_of(7, 8, tail=1)
    on_host(rig, longer, other)
    rig.copier.up.error = OSError("no such luck")
    first = rig.admit(PROMPT, run=False)
    rig.hierarchy.load_back.queue.wait(10.0)
    rig.copier.up.error = None
    second = rig.admit(longer, run=False)
    third = rig.admit(other, run=False)
    shared = rig.admit(PROMPT, run=False)
    requests = [request for request in (first, second, third, shared) if request is not None]
    assert len(requests) == 4
    for request in requests:
        gate = rig.hierarchy.load_back.gate
        gate.set_consumer(request.gate_index)
        gate.wait_until(N_LAYERS - 1)
        assert gate.has_failed(request.gate_index)
    assert rig.hierarchy.has_failed(requests[-1].gate_index)
    for request in requests:
        rig.abort(request)
    rig.drain()
    assert rig.usable(longer) == (0, 6)
    rig.check_idle()


def test_a_load_ahead_that_fails_is_nobodys_loss(make_rig: MakeRig) -> None:
    rig = make_rig()
    on_host(rig, PROMPT)
    node = rig.hierarchy.match(rig.hierarchy.root(), PROMPT).last
    soon = DemandForecast({node.node_id: Expectation(0.1)})
    rig.copier.up.errors_to_come.append(OSError("no such luck"))
    rig.hierarchy.forecast(soon)
    assert rig.in_flight == 1
    rig.drain()
    assert rig.usable(PROMPT) == (0, 4)
    rig.hierarchy.forecast(soon)
    assert rig.in_flight == 0, "loads fail: nothing is tried that nobody waits for"
    rig.serve(PROMPT)
    rig.check()


def test_an_insert_over_pages_whose_load_failed_brings_its_own(make_rig: MakeRig) -> None:
    rig = make_rig()
    request = rig.admit(PROMPT)
    assert request is not None
    on_host(rig, PROMPT)
    rig.copier.up.error = OSError("no such luck")
    loading = rig.admit(PROMPT, run=False)
    assert loading is not None
    assert loading.n_host == 16
    rig.abort(loading)
    rig.finish(request)
    assert rig.usable(PROMPT)[0] == 4
    rig.drain()
    rig.check_idle()


def test_a_load_that_fails_before_its_pass_has_begun(make_rig: MakeRig) -> None:
    """Room is made while the batch is formed, and what was being loaded is waited for."""
    rig = make_rig(8)
    on_host(rig, PROMPT)
    rig.copier.up.error = OSError("no such luck")
    request = rig.admit(PROMPT, run=False)
    assert request is not None
    assert rig.hierarchy.evict_device(32) == 0
    assert rig.usable(PROMPT) == (0, 4)
    # The pages that it reads are no longer its own: whoever runs it must be told.
    assert rig.hierarchy.load_back.gate.has_failed(request.gate_index)
    assert rig.hierarchy.has_failed(request.gate_index)
    rig.abort(request)
    rig.drain()
    rig.check_idle()
