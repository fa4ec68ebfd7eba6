"""Load or recompute through the whole hierarchy, on one rank and on two that are unlike."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from support_tiers.costs import give_costs, page_s
from support_tiers.tier_rig import PAGE_SIZE, Rig, new_disk, on_disk, on_host, tokens_of
from tiered_kv.core.ids import Tier
from tiered_kv.memory.demand import DemandForecast, Expectation
from tiered_kv.scheduler.calibration import Calibrator, StepObservation
from tiered_kv.tiers import progress
from tiered_kv.tiers.hierarchy import TransferTimeoutError

pytestmark = pytest.mark.timeout(60)

MakeRig = Callable[..., Rig]
PROMPT = tokens_of(1, 2, 3, 4, tail=1)


def test_a_fast_host_is_loaded_from(make_rig: MakeRig) -> None:
    rig = make_rig()
    give_costs(rig)
    on_host(rig, PROMPT)
    assert rig.serve(PROMPT).n_host == 16


def test_a_slow_host_is_not(make_rig: MakeRig) -> None:
    rig = make_rig()
    give_costs(rig, load_page_s=100.0)
    on_host(rig, PROMPT)
    assert rig.serve(PROMPT).n_host == 0
    rig.drain()
    rig.check_idle()


def test_the_boundary_falls_inside_a_prefix(make_rig: MakeRig) -> None:
    """Loading a page takes as long as computing one: half is loaded while half is computed."""
    rig = make_rig()
    give_costs(rig, load_page_s=page_s(rig))
    prompt = tokens_of(*range(1, 9), tail=1)
    on_host(rig, prompt)
    request = rig.serve(prompt)
    assert 3 * PAGE_SIZE <= request.n_host <= 5 * PAGE_SIZE
    rig.drain()
    rig.check_idle()


@pytest.mark.parametrize(("policy", "n_host"), [("always", 16), ("never", 0)])
def test_the_policy_may_leave_costs_aside(make_rig: MakeRig, policy: str, n_host: int) -> None:
    rig = make_rig(disk=new_disk())
    give_costs(rig, load_page_s=1.0, policy=policy)
    on_host(rig, PROMPT)
    assert rig.serve(PROMPT).n_host == n_host
    rig.drain()
    rig.drop_from_device()
    rig.drop_from_host()
    assert rig.prefetch("r", PROMPT) == n_host


def test_a_slow_disk_is_not_read(make_rig: MakeRig) -> None:
    rig = make_rig(disk=new_disk())
    give_costs(rig, read_page_s=100.0)
    on_disk(rig, PROMPT)
    assert rig.prefetch("r", PROMPT) == 0
    assert rig.disk.n_read_calls == 0
    rig.check_idle()


def test_a_read_that_hangs_is_not_waited_for_longer_than_computing_takes(
    make_rig: MakeRig,
) -> None:
    rig = make_rig(disk=new_disk())
    give_costs(rig)
    on_disk(rig, PROMPT)
    rig.disk.reads.hold()
    rig.arrive("r", PROMPT)
    started = time.monotonic()
    rig.poll_until(lambda: rig.hierarchy.prefetch.done("r"))
    assert time.monotonic() - started >= 0.5 * 4 * page_s(rig)
    rig.serve(PROMPT)
    rig.hierarchy.prefetch.release("r")
    rig.check()
    rig.disk.reads.release()
    rig.drain()
    rig.check_idle()


def test_the_server_learns_from_its_transfers_and_prefills(make_rig: MakeRig) -> None:
    rig = make_rig(disk=new_disk())
    model = give_costs(rig)
    calibrator = rig.context.calibrator = Calibrator(model)
    rig.copier.down.delay = lambda: 0.01
    before = model.edge(Tier.DEVICE, Tier.HOST), model.prefill_s(100)
    for n in range(12):
        rig.hierarchy.observe_step(StepObservation(((100, 0),), 0, 0, 5.0))
        rig.serve(tokens_of(10 * n, 10 * n + 1))
        rig.drain()
    cost = model.edge(Tier.DEVICE, Tier.HOST)
    n_bytes = 2 * rig.page_format.page_bytes
    assert cost.latency_s + n_bytes / cost.bandwidth == pytest.approx(0.01, rel=0.5)
    assert cost != before[0]
    assert calibrator.n_prefills == 12
    assert model.prefill_s(100) > before[1]


def test_what_is_expected_is_loaded_ahead_into_free_room(make_rig: MakeRig) -> None:
    rig = make_rig(n_device_pages=6)
    give_costs(rig)
    other = tokens_of(7, 8, 9)
    on_host(rig, PROMPT, other)
    root = rig.hierarchy.root()
    soon, later = (rig.hierarchy.match(root, prompt).last for prompt in (PROMPT, other))
    rig.hierarchy.forecast(
        DemandForecast(
            {soon.node_id: Expectation(0.1), later.node_id: Expectation(1.0, probability=0.9)}
        )
    )
    rig.drain()
    assert rig.usable(PROMPT) == (4, 0)
    assert rig.usable(other) == (2, 1), "as far as there is room, its head first"
    last = rig.hierarchy.match(root, PROMPT).last_device
    assert rig.forest.take_ahead(last, Tier.DEVICE) == 4 * PAGE_SIZE
    rig.check_idle()


def test_what_is_expected_late_or_hardly_is_not_loaded_ahead(make_rig: MakeRig) -> None:
    rig = make_rig()
    on_host(rig, PROMPT)
    node = rig.hierarchy.match(rig.hierarchy.root(), PROMPT).last
    for expected in (Expectation(60.0), Expectation(0.1, probability=0.2)):
        rig.hierarchy.forecast(DemandForecast({node.node_id: expected}))
        assert rig.in_flight == 0


@pytest.mark.parametrize("direction", ["down", "up"])
def test_a_copy_that_hangs_is_an_answer_and_not_a_hang(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch, direction: str
) -> None:
    monkeypatch.setattr(progress, "SETTLE_TIMEOUT_S", 0.05)
    rig = make_rig()
    hierarchy = rig.hierarchy
    if direction == "down":
        rig.copier.down.hold()
        rig.serve(PROMPT)
    else:
        on_host(rig, PROMPT)
        rig.copier.up.hold()
        request = rig.admit(PROMPT, run=False)
        assert request is not None
        rig.abort(request)
    assert not hierarchy.drain()
    assert hierarchy.evict_device(16) == 0
    with pytest.raises(TransferTimeoutError, match="cannot be emptied while a copy"):
        hierarchy.flush()
    if direction == "up":
        with pytest.raises(TransferTimeoutError, match="to the device did not end"):
            hierarchy.insert(hierarchy.root(), PROMPT, torch.arange(16))
    rig.check()
    rig.copier.down.release()
    rig.copier.up.release()
    assert hierarchy.drain()
    rig.drain()
    rig.check_idle()
