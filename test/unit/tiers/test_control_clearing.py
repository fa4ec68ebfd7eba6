"""Prompts moved down and forgotten: all of what is meant, nothing of what others use."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from support_tiers.orders import (
    INSPECT,
    LONGER,
    OTHER,
    PREFIX,
    PROMPT,
    carry_out,
    control_of,
    prompts_of,
    tiers,
)
from support_tiers.shared_blobs import SharedBlobs
from support_tiers.tier_rig import Rig, new_disk, on_disk, on_host, tokens_of
from tiered_kv.core.ids import Tier
from tiered_kv.tiers.control.control import Order

pytestmark = pytest.mark.timeout(60)

MakeRig = Callable[..., Rig]


# -- demote -------------------------------------------------------------------------------------


def test_demote_writes_first_and_loses_nothing(make_rig: MakeRig) -> None:
    rig = make_rig(disk=new_disk())
    rig.copier.down.hold()
    rig.serve(PROMPT)
    control = control_of(rig)
    control.begin("o", Order("demote", Tier.DISK), prompts_of(rig, PROMPT))
    for _ in range(5):
        assert control.go_on("o", is_late=False)[0] is None
        rig.hierarchy.poll()
    assert rig.usable(PROMPT) == (4, 0)
    rig.copier.down.release()
    outcome = None
    while outcome is None:
        outcome, _ = control.go_on("o", is_late=False)
        rig.hierarchy.poll()
    assert outcome["done"] == {"device": 16, "host": 16}
    assert outcome["tiers"] == tiers(0, 0, 4)
    assert rig.prefetch("r", PROMPT) == 16
    rig.serve(PROMPT)
    rig.drain()
    rig.check_idle()


def test_demote_to_the_host_leaves_it_there(make_rig: MakeRig) -> None:
    rig = make_rig(disk=new_disk())
    rig.serve(LONGER)
    outcome = carry_out(rig, Order("demote", Tier.HOST), PREFIX)
    assert outcome["done"] == {"device": 24}
    assert rig.usable(LONGER) == (0, 6)


def test_demote_without_a_disk_keeps_what_only_the_host_has(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.serve(PROMPT)
    outcome = carry_out(rig, Order("demote", Tier.DISK), PROMPT)
    assert outcome["done"]["host"] == 0
    assert outcome["unwritten"] == 16
    assert rig.usable(PROMPT) == (0, 4)


@pytest.mark.parametrize("action", ["demote", "drop"])
def test_who_runs_goes_on_undisturbed(make_rig: MakeRig, action: str) -> None:
    rig = make_rig(disk=new_disk())
    rig.serve(tokens_of(1, 2, 3, 4, 8, 9))
    rig.drain()
    request = rig.admit(LONGER, run=False)
    assert request is not None
    outcome = carry_out(rig, Order(action, Tier.DISK), PREFIX)
    assert outcome["in_use"] == 16
    assert outcome["done"]["device"] == 8, "what somebody else went on with is no more"
    assert rig.forward(request)
    rig.finish(request)
    rig.drain()
    assert carry_out(rig, Order(action, Tier.DISK), PREFIX)["in_use"] == 0
    assert rig.usable(LONGER) == (0, 0)
    rig.check_idle()


def test_what_others_go_on_from_stays(make_rig: MakeRig) -> None:
    rig = make_rig(disk=new_disk())
    rig.serve(PROMPT)
    rig.serve(OTHER)
    outcome = carry_out(rig, Order("drop"), PROMPT)
    assert outcome["shared"] == 8
    assert outcome["done"] == tiers(2, 2, 2)
    assert rig.usable(PROMPT) == (2, 0)
    assert rig.usable(OTHER) == (4, 0)
    rig.drain()
    rig.check_idle()


def test_what_goes_on_with_another_token_is_no_part_of_a_prompt(make_rig: MakeRig) -> None:
    rig = make_rig(disk=new_disk())
    rig.serve(LONGER)
    rig.serve(tokens_of(1, 2, 3, 4, 9))
    five_thousand = PREFIX + LONGER[16:18]
    outcome = carry_out(rig, Order("drop"), five_thousand)
    assert outcome["done"]["device"] == 8
    assert outcome["shared"] == 16
    assert rig.usable(tokens_of(1, 2, 3, 4, 9)) == (5, 0)


# -- drop ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [on_disk, on_host, None])
def test_drop_forgets_in_all_tiers(make_rig: MakeRig, where: Callable[..., None] | None) -> None:
    rig = make_rig(disk=new_disk())
    if where is None:
        rig.serve(LONGER)
    else:
        where(rig, LONGER)
    asked = LONGER if where is on_disk else PREFIX
    outcome = carry_out(rig, Order("drop"), asked)
    assert outcome["done"]["disk"] == 24
    assert outcome["nowhere"] == len(asked) // 4 * 4
    assert rig.stored_pages(LONGER) == 0
    assert rig.prefetch("r", LONGER) == 0
    assert rig.usable(LONGER) == (0, 0)
    rig.serve(LONGER)
    rig.drain()
    assert rig.stored_pages(LONGER) == 6, "it is written again when it is computed again"
    rig.check_idle()


def test_drop_waits_for_what_is_being_written(make_rig: MakeRig) -> None:
    rig = make_rig(disk=new_disk())
    rig.disk.writes.hold()
    rig.serve(PROMPT)
    rig.poll_until(lambda: rig.writes.in_flight > 0)
    control = control_of(rig)
    control.begin("o", Order("drop"), prompts_of(rig, PROMPT))
    for _ in range(5):
        assert control.go_on("o", is_late=False)[0] is None
        rig.hierarchy.poll()
    rig.disk.writes.release()
    outcome = None
    while outcome is None:
        outcome, _ = control.go_on("o", is_late=False)
        rig.hierarchy.poll()
    assert outcome["in_use"] == 0
    assert rig.stored_pages(PROMPT) == 0
    rig.check_idle()


def test_of_a_shared_store_only_what_this_server_wrote_is_dropped(make_rig: MakeRig) -> None:
    remote = SharedBlobs()
    first, second = (make_rig(64, 64, new_disk(), remote=remote) for _ in range(2))
    for rig, prompt in ((first, PROMPT), (second, OTHER)):
        rig.serve(prompt)
        rig.drain()
    n_blobs = len(remote.blobs)
    outcome = carry_out(second, Order("drop"), PROMPT)
    assert outcome["done"]["store"] == 0
    assert carry_out(first, INSPECT, PROMPT)["tiers"]["store"] == 16
    outcome = carry_out(first, Order("drop"), PROMPT)
    assert outcome["done"]["store"] == 16
    assert len(remote.blobs) == n_blobs - 4


def test_a_session_of_several_prompts(make_rig: MakeRig) -> None:
    rig = make_rig(disk=new_disk())
    rig.serve(LONGER)
    rig.serve(OTHER)
    outcome = carry_out(rig, Order("drop"), LONGER, OTHER)
    assert outcome["prompts"] == 2
    assert outcome["shared"] == 0
    assert rig.usable(LONGER) == rig.usable(OTHER) == (0, 0)
    assert len(rig.forest) == 0
