"""The whole hierarchy where tiers keep pages in other formats than the device."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from support_tiers.costs import give_costs
from support_tiers.page_codec import page_layout
from support_tiers.tier_rig import (
    N_LAYERS,
    PAGE_SIZE,
    Rig,
    new_disk,
    on_disk,
    on_host,
    tokens_of,
)
from tiered_kv.core.ids import Tier
from tiered_kv.scheduler.calibration import Calibrator
from tiered_kv.tiers.in_memory import InMemoryStore
from tiered_kv.tiers.page_format import PageFormat

pytestmark = pytest.mark.timeout(60)

MakeRig = Callable[..., Rig]
PROMPT = tokens_of(1, 2, 3, 4, tail=1)
FORMATS = ["fp8", "int4", "kitty", "int2"]


@pytest.mark.parametrize("name", FORMATS)
def test_a_prefix_comes_back_from_the_host(make_rig: MakeRig, name: str) -> None:
    """The request's layers compare what they read behind the gate with what was computed."""
    rig = make_rig(host_format=name, lasting=name)
    on_host(rig, PROMPT)
    assert rig.serve(PROMPT).n_host == 4 * PAGE_SIZE
    rig.drain()
    rig.check_idle()


def test_what_a_format_changes_is_noticed(make_rig: MakeRig) -> None:
    """So the test before would fail were the copies not to convert back what they wrote."""
    rig = make_rig(host_format="int2", lasting="fp8")
    on_host(rig, PROMPT)
    with pytest.raises(AssertionError, match="is not what was computed"):
        rig.serve(PROMPT)


@pytest.mark.parametrize(("host", "disk"), [("fp8", "fp8"), ("raw", "int4"), ("int4", "int4")])
def test_a_prefix_comes_back_from_the_disk_in_another_process(
    make_rig: MakeRig, host: str, disk: str
) -> None:
    store = InMemoryStore()
    formats = {"host_format": host, "disk_format": disk}
    before = make_rig(disk=new_disk(store, **formats), host_format=host, lasting=disk)
    on_disk(before, PROMPT)
    after = make_rig(disk=new_disk(store, **formats), host_format=host, lasting=disk)
    assert after.prefetch("r", PROMPT) == 4 * PAGE_SIZE
    assert after.serve(PROMPT).n_host == 4 * PAGE_SIZE
    after.drain()
    after.check_disk()
    after.check_idle()


def test_what_is_observed_and_learned_are_the_bytes_that_moved(make_rig: MakeRig) -> None:
    disk = new_disk(host_format="raw", disk_format="int4")
    rig = make_rig(disk=disk, lasting="int4")
    stored = PageFormat.of_layout(page_layout("int4", PAGE_SIZE, N_LAYERS))
    rig.use(disk, stored)
    moved: dict[tuple[Tier, Tier], int] = {}
    learned: dict[tuple[Tier, Tier], int] = {}

    def observe(source: Tier, target: Tier, n_pages: int, n_bytes: int, seconds: float) -> None:
        moved[source, target] = moved.get((source, target), 0) + n_bytes

    class Learner(Calibrator):
        def observe_transfer(
            self, source: Tier, target: Tier, n_bytes: int, seconds: float
        ) -> None:
            learned[source, target] = learned.get((source, target), 0) + n_bytes

    rig.context.observer.transferred = observe  # type: ignore[method-assign]
    rig.context.calibrator = Learner(give_costs(rig))
    on_disk(rig, PROMPT)
    rig.prefetch("r", PROMPT)
    rig.drain()
    page, on_disk_page = rig.page_format.page_bytes, stored.page_bytes
    assert on_disk_page != page
    assert moved == learned
    assert moved[Tier.DEVICE, Tier.HOST] == 4 * page
    assert moved[Tier.HOST, Tier.DISK] == moved[Tier.DISK, Tier.HOST] == 4 * on_disk_page


def test_a_host_pool_of_the_same_size_holds_more_pages(make_rig: MakeRig) -> None:
    raw, int4 = make_rig(page_size=256), make_rig(page_size=256, host_format="int4")
    assert int4.host.slot_bytes < raw.host.slot_bytes
