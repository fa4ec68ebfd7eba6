"""A link believed too slow to use: it is tried now and then, and the belief is put right.

Guarantee: whatever was measured once, a link that is fast is used again after some probes; nobody
waits for a probe of the disk; between two probes nothing is moved.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from support_tiers.costs import give_costs
from support_tiers.tier_rig import Rig, new_disk, on_disk, on_host, tokens_of
from tiered_kv.memory.probes import PROBE_EVERY_S, PROBE_PAGES, Probes
from tiered_kv.scheduler.calibration import Calibrator

pytestmark = pytest.mark.timeout(60)

MakeRig = Callable[..., Rig]
PROMPT = tokens_of(*range(1, 9), tail=1)
N_PAGES = 8
SLOW_S = 10.0


def time_passes(rig: Rig) -> None:
    """Enough for a probe; the hierarchy's clock tells with the next transfer."""
    rig.hierarchy.progress._started_at -= PROBE_EVERY_S
    rig.context.now_s += PROBE_EVERY_S


def test_probes_come_at_an_interval() -> None:
    probes = Probes()
    assert not probes.is_due(PROBE_EVERY_S - 0.1)
    assert probes.is_due(PROBE_EVERY_S)
    probes.begun(PROBE_EVERY_S + 1.0)
    assert not probes.is_due(2 * PROBE_EVERY_S + 0.9)
    assert probes.is_due(2 * PROBE_EVERY_S + 1.0)


def test_a_disk_believed_slow_is_found_out(make_rig: MakeRig) -> None:
    rig = make_rig(disk=new_disk())
    rig.context.calibrator = Calibrator(give_costs(rig, read_page_s=SLOW_S))
    on_disk(rig, PROMPT)
    prefetch = rig.hierarchy.prefetch
    for n in range(30):
        rig.arrive(f"soon {n}", PROMPT)
        if not prefetch.done(f"soon {n}"):
            break  # it is waited for again
        prefetch.release(f"soon {n}")
        assert not rig.reads.in_flight
        time_passes(rig)
        rig.arrive(f"r{n}", PROMPT)
        if not prefetch.done(f"r{n}"):
            break
        n_calls = rig.disk.n_read_calls
        prefetch.release(f"r{n}")  # it runs at once, and what was begun goes on behind
        rig.poll_until(lambda: not rig.reads.in_flight)
        assert rig.disk.n_read_calls <= n_calls + 1
        assert rig.usable(PROMPT) == (0, PROBE_PAGES)
        rig.drop_from_host()
    else:
        pytest.fail("the disk is never read again")
    assert n >= 1
    prefetch.clear()
    rig.drain()
    assert rig.prefetch("last", PROMPT) == N_PAGES * 4
    rig.check_idle()


@pytest.mark.parametrize("is_due", [True, False])
def test_a_read_that_was_given_up_before_it_began(make_rig: MakeRig, is_due: bool) -> None:
    rig = make_rig(disk=new_disk())
    give_costs(rig, policy="always")
    on_disk(rig, PROMPT)
    prefetch = rig.hierarchy.prefetch
    rig.disk.reads.hold()
    rig.arrive("first", tokens_of(1, tail=1))
    if is_due:
        time_passes(rig)
    rig.arrive("second", PROMPT)
    prefetch.give_up("second")
    assert prefetch.done("second")
    prefetch.release("second")
    rig.disk.reads.release()
    rig.poll_until(lambda: not rig.reads.in_flight)
    assert rig.usable(PROMPT) == (0, 1 + PROBE_PAGES if is_due else 1)
    prefetch.clear()
    rig.drain()
    rig.check_idle()


def test_what_a_probe_took_is_learned_though_it_is_not_all_of_the_read(make_rig: MakeRig) -> None:
    rig = make_rig(disk=new_disk())
    observed: list[int] = []

    class Learner(Calibrator):
        def observe_transfer(self, *edge: object) -> None:
            observed.append(edge[2])  # type: ignore[arg-type]

    rig.context.calibrator = Learner(give_costs(rig, policy="always"))
    on_disk(rig, PROMPT)
    observed.clear()
    time_passes(rig)
    prefetch = rig.hierarchy.prefetch
    rig.disk.reads.hold()
    rig.arrive("blocker", tokens_of(1, tail=1))
    rig.arrive("r", PROMPT)
    prefetch.release("r")
    rig.disk.reads.release()
    rig.poll_until(lambda: not rig.reads.in_flight)
    page_bytes = rig.page_format.page_bytes
    assert sorted(observed) == [page_bytes, PROBE_PAGES * page_bytes]
    prefetch.clear()
    rig.check_idle()


def test_a_host_believed_slow_is_found_out(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.context.calibrator = Calibrator(give_costs(rig, load_page_s=SLOW_S))
    on_host(rig, PROMPT)
    n_loaded: list[int] = []
    while N_PAGES not in n_loaded:
        assert len(n_loaded) < 30
        if len(n_loaded) > 1:
            time_passes(rig)
        n_loaded.append(rig.serve(PROMPT).n_host // 4)
        rig.drain()
        rig.drop_from_device()
    assert n_loaded[:3] == [0, 0, PROBE_PAGES]
    rig.check_idle()


def test_never_is_never(make_rig: MakeRig) -> None:
    rig = make_rig(disk=new_disk())
    give_costs(rig, policy="never")
    on_disk(rig, PROMPT)
    for _ in range(3):
        time_passes(rig)
        assert rig.prefetch("r", PROMPT) == 0
        rig.hierarchy.prefetch.release("r")
    assert rig.disk.n_read_calls == 0
    rig.check_idle()
