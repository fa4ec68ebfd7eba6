"""What administrators do to prompts: each action by its effect, beside requests and without."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from pathlib import Path

import pytest

from support_tiers.orders import (
    INSPECT,
    LONGER,
    PREFIX,
    PROMPT,
    carry_out,
    control_of,
    prompts_of,
    tiers,
)
from support_tiers.ranks import Ranks
from support_tiers.tier_rig import Rig, new_disk, on_disk, on_host, tokens_of
from tiered_kv.core.ids import Tier
from tiered_kv.forest.key import page_hashes
from tiered_kv.memory.demand import Expectation
from tiered_kv.tiers.control.control import OPEN_MAX, Order
from tiered_kv.tiers.disk.store import DiskStore

pytestmark = pytest.mark.timeout(60)

MakeRig = Callable[..., Rig]


# -- inspect ------------------------------------------------------------------------------------


def test_inspect_says_where_the_pages_lie(make_rig: MakeRig) -> None:
    rig = make_rig(disk=new_disk())
    assert carry_out(rig, INSPECT, PROMPT) | {"below": 0} == {
        "prompts": 1,
        "tokens": 17,
        "tiers": tiers(0, 0, 0),
        "nowhere": 16,
        "in_use": 0,
        "below": 0,
        "kept": {},
        "next_use_s": None,
        "next_use_probability": None,
    }
    on_disk(rig, LONGER)
    assert carry_out(rig, INSPECT, PROMPT)["tiers"] == tiers(0, 0, 4)
    rig.prefetch("r", PROMPT)
    found = carry_out(rig, INSPECT, LONGER)
    assert found["tiers"] == tiers(0, 4, 6)
    assert found["nowhere"] == 0
    rig.serve(LONGER)
    rig.drain()
    before = [node.last_access for node in rig.forest.nodes()]
    found = carry_out(rig, INSPECT, PREFIX)
    assert found["tiers"] == tiers(4, 4, 4)
    assert found["below"] == 8
    assert carry_out(rig, INSPECT, PROMPT)["below"] == 0, "its last token is another"
    assert [node.last_access for node in rig.forest.nodes()] == before, "looking is no use"


def test_inspect_says_who_uses_it_and_when_it_is_expected(make_rig: MakeRig) -> None:
    rig = make_rig(disk=new_disk())
    request = rig.admit(LONGER)
    assert request is not None
    rig.stash(request)
    control = control_of(rig)
    last = rig.forest.nodes()[-1]
    control.means.next_use = lambda: {last.node_id: Expectation(7.0, 0.9)}
    found = carry_out(rig, INSPECT, PREFIX, control=control)
    assert found["in_use"] == 16
    assert (found["next_use_s"], found["next_use_probability"]) == (7.0, 0.9)


# -- prefetch -----------------------------------------------------------------------------------


def test_prefetch_brings_to_the_host_and_to_the_device(make_rig: MakeRig) -> None:
    rig = make_rig(disk=new_disk())
    on_disk(rig, PROMPT)
    outcome = carry_out(rig, Order("prefetch", Tier.HOST), PROMPT)
    assert outcome["done"] == {"host": 16, "device": 0}
    assert rig.usable(PROMPT) == (0, 4)
    outcome = carry_out(rig, Order("prefetch", Tier.DEVICE), PROMPT)
    assert outcome["done"] == {"host": 0, "device": 16}
    assert rig.usable(PROMPT) == (4, 0)
    rig.serve(PROMPT)
    rig.drain()
    rig.check_idle()


def test_prefetch_takes_nothing_from_who_runs(make_rig: MakeRig) -> None:
    rig = make_rig(8, 32, new_disk())
    on_disk(rig, PROMPT)
    request = rig.admit(tokens_of(*range(20, 26)))
    assert request is not None
    outcome = carry_out(rig, Order("prefetch", Tier.DEVICE), PROMPT)
    assert outcome["done"]["host"] == 16
    assert outcome["done"]["device"] <= 8
    rig.finish(request)
    rig.drain()
    rig.check_idle()


def test_prefetch_that_is_late_lets_go(make_rig: MakeRig) -> None:
    rig = make_rig(disk=new_disk())
    on_disk(rig, PROMPT)
    rig.disk.reads.hold()
    outcome = carry_out(rig, Order("prefetch"), PROMPT, rounds_max=5)
    assert outcome["done"] == {"host": 0, "device": 0}
    rig.disk.reads.release()
    rig.drain()
    assert not rig.hierarchy.prefetch.tickets
    rig.check_idle()


# -- keep ---------------------------------------------------------------------------------------


def test_what_is_kept_stays_on_the_host_until_it_ends(make_rig: MakeRig) -> None:
    rig = make_rig(32, 8, new_disk())
    rig.stop_clock()
    on_host(rig, PROMPT)
    outcome = carry_out(rig, Order("keep", Tier.HOST, "", 60.0), PROMPT)
    assert outcome["done"] == {"host": 16, "disk": 16}
    assert outcome["kept"] == {
        "host": {"tokens": 16, "ends_in_s": 60.0},
        "disk": {"tokens": 16, "ends_in_s": 60.0},
    }
    for n in range(10, 40, 2):
        rig.serve(tokens_of(n, n + 1))
        rig.drain()
    assert rig.usable(PROMPT) == (0, 4)
    rig.later(61.0)
    for _ in range(40):
        rig.hierarchy.poll()
    for n in range(40, 60, 2):
        rig.serve(tokens_of(n, n + 1))
        rig.drain()
    assert rig.usable(PROMPT) == (0, 0)
    assert not rig.context.manager.keeps
    assert not rig.context.manager.keeps.given_up_pages
    rig.check_idle()


def test_what_is_kept_makes_way_for_who_runs(make_rig: MakeRig) -> None:
    rig = make_rig(32, 8, new_disk())
    on_host(rig, PROMPT)
    carry_out(rig, Order("keep", Tier.HOST, "", 60.0), PROMPT)
    big = tokens_of(*range(10, 17))
    rig.serve(big)
    rig.drain()
    rig.drop_from_device()
    assert rig.usable(big) == (0, 7)
    assert rig.context.manager.keeps.given_up_pages[Tier.HOST] == 3
    rig.check_idle()


def test_keeps_are_bounded_for_each_tenant_and_all(make_rig: MakeRig) -> None:
    rig = make_rig(64, 16, new_disk())
    prompts = [tokens_of(*range(n, n + 4)) for n in (10, 20, 30)]
    on_host(rig, *prompts)
    control = control_of(rig, share=0.5, disk_pages=0)
    done = [
        carry_out(rig, Order("keep", Tier.HOST, tenant, 9.0), prompt, control=control)
        for tenant, prompt in (("a", prompts[0]), ("a", prompts[1]), ("b", prompts[2]))
    ]
    assert [one["done"]["host"] for one in done] == [16, 0, 16]
    assert [one["beyond_bounds"] for one in done] == [16, 32, 16]
    shorter = carry_out(rig, Order("keep", Tier.HOST, "a", 0.0), prompts[0], control=control)
    assert shorter["kept"] == {}


def test_what_is_kept_on_disk_is_not_the_first_to_go_there(
    make_rig: MakeRig, tmp_path: Path
) -> None:
    rig = make_rig(64, 64)
    page_bytes = rig.copier.page_format.page_bytes
    with DiskStore.open(tmp_path / "disk", capacity_bytes=4 << 20) as store:
        rig_disk = store.namespace(bytes(32), page_bytes)
        disk = new_disk()
        disk.namespace = rig_disk
        rig = make_rig(64, 64, disk)
        on_disk(rig, PROMPT)
        control = control_of(rig)
        outcome = carry_out(rig, Order("keep", Tier.DISK, "", 600.0), PROMPT, control=control)
        assert outcome["done"] == {"host": 0, "disk": 16}
        for n in range(60):
            on_disk(rig, tokens_of(*range(100 + 20 * n, 120 + 20 * n)))
            control._touched_s = -1e9
            control.polled()
            assert control._touching is not None
            control._touching.result(5.0)
        assert len(rig_disk) < 60 * 20, "the disk was full"
        assert rig.stored_pages(PROMPT) == 4


# -- rounds -------------------------------------------------------------------------------------


def test_large_ones_take_many_rounds_and_the_oldest_of_too_many_is_given_up(
    make_rig: MakeRig,
) -> None:
    rig = make_rig(256, 256, new_disk())
    for n in range(1, 100):
        rig.serve(tokens_of(0, *range(1, n)))
    control = control_of(rig)
    control.begin("o", Order("drop"), prompts_of(rig, tokens_of(0)))
    n_before = len(rig.forest)
    for _ in range(20):
        control.go_on("o", is_late=False)
        assert n_before - len(rig.forest) <= 17
        n_before = len(rig.forest)
        rig.hierarchy.poll()
    for n in range(OPEN_MAX):
        control.begin(f"{n}", INSPECT, [])
    with pytest.raises(KeyError):
        control.go_on("o", is_late=False)
    rig.drain()
    rig.check_idle()


def test_ranks_do_the_same(ranks: Ranks) -> None:
    ranks.on_disk(PROMPT)
    controls = {id(rig): control_of(rig) for rig in ranks}

    def carry(order: Order, tokens: array[int]) -> list[dict[str, int]]:
        ranks.each(lambda rig: controls[id(rig)].begin("o", order, prompts_of(rig, tokens)))
        while True:
            outcomes = ranks.each(lambda rig: controls[id(rig)].go_on("o", is_late=False)[0])
            if None not in outcomes:
                return [outcome["done"] for outcome in outcomes]
            assert outcomes == [None, None]
            ranks.each(lambda rig: rig.hierarchy.poll())

    for order, done in (
        (Order("prefetch", Tier.DEVICE), {"host": 16, "device": 16}),
        (Order("keep", Tier.HOST, "", 5.0), {"host": 16, "disk": 16}),
        (Order("demote", Tier.DISK), {"device": 16, "host": 16}),
        (Order("drop"), {"device": 0, "host": 0, "disk": 16}),
    ):
        assert carry(order, PROMPT) == [done, done], order
    # What only one rank has lost is nowhere.
    ranks.on_disk(PROMPT)
    rig = ranks.rigs[1]
    roots = [rig.hierarchy.root() for rig in ranks]
    hashes = page_hashes(roots[1].last_page_hash, PROMPT, rig.page_size)
    rig.disk.drop_pages(hashes[2:])
    assert carry(Order("prefetch"), PROMPT) == [{"host": 8, "device": 0}] * 2
