"""Stages of a pipeline under random histories, passes apart, each with troubles of its own.

Method: the histories of `test_hierarchy_histories.py`, one for each stage, on threads that wait for
each other as SGLang's stages do (`support_tiers.stages`). Transfers take other times on each stage,
and disks fail, hang and forget on one alone.
Guarantee: that of those histories on each stage (every resident page has the bytes computed for its
name, every slot is used once); in every pass all stages have decided the same; nobody waits for who
waits for him.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from typing import Any

import pytest

from support_tiers.doubles import FaultyDisk, random_delays
from support_tiers.random_history import History
from support_tiers.stages import Pipeline, StageOfPipeline, StuckError
from support_tiers.tier_rig import Rig, new_disk
from tiered_kv.memory import read_turns
from tiered_kv.tiers.stages import StagesPartedError

pytestmark = pytest.mark.timeout(120)

N_HISTORIES = int(os.environ.get("TIERED_KV_PROPERTY_EXAMPLES", "16"))
N_PASSES = 120
LONGEST_DELAY_S = 0.004
LAST_PASSES_MAX = 4000

#: (stages, device pages, host pages, is there a disk)
SIZES = [
    (2, 48, 40, True),
    (3, 40, 14, True),
    (2, 20, 40, True),
    (4, 32, 6, True),
    (2, 32, 20, False),
]


@pytest.fixture(autouse=True)
def short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_turns, "READ_STRETCH_PAGES", 2)


class StageHistory(History):
    """What a stage does: no orders, and copies between memories do not fail (see below)."""

    def __init__(self, rig: Rig, seed: int, world: int, stage: StageOfPipeline) -> None:
        super().__init__(rig, seed, world)
        self.stage = stage
        self.decided: list[dict[str, Any]] = []
        self.load_error: OSError | None = None
        left_out = (self._order, self._go_on_with_orders, self._others_use_it)
        self.steps = [(weight, step) for weight, step in self.steps if step not in left_out]

    def _change_faults(self) -> str:
        outcome = super()._change_faults()
        self.rig.copier.down.error, self.rig.copier.up.error = None, self.load_error
        return outcome

    def _forget_disk(self) -> str:
        """On this stage alone, and nobody says so: pages are gone when they are read."""
        if isinstance(self.rig.disk, FaultyDisk) and self.world.random() < 0.5:
            self.rig.disk.clear_all()
        return "a disk forgets"

    def run(self, n_passes: int) -> None:
        for _ in range(n_passes):
            self._pass(self.rng.randint(0, 3))
        self._work_again()
        for request in list(self.rig.requests):
            self.rig.finish(request)
        for rid in list(self.waiting):
            self.rig.hierarchy.prefetch.release(rid)
        for _ in range(LAST_PASSES_MAX):
            if not self.rig.hierarchy.progress.is_busy and not self._is_writing():
                break
            self._pass(0)
            time.sleep(0.0005)
        self.stage.leave()
        self.rig.check_idle()
        assert not self.rig.in_flight

    def _is_writing(self) -> bool:
        return bool(self.rig.hierarchy.write_back.n_deferred)

    def _pass(self, n_steps: int) -> None:
        self.stage.begin_pass()
        self.rig.hierarchy.poll()
        self.log.append("a pass")
        for _ in range(n_steps):
            self.step()
        self.decided.append(self.decisions())
        self.stage.launch()
        self.stage.end_pass()


def make_histories(seed: int, lag: int | None = None) -> tuple[Pipeline, list[StageHistory]]:
    n_stages, n_device, n_host, has_disk = SIZES[seed % len(SIZES)]
    pipeline = Pipeline(n_stages, lag)
    histories = []
    for index in range(n_stages):
        stage = pipeline.stage(index)
        disk = new_disk() if has_disk else None
        rig = Rig(n_device, n_host, disk, shard=index, stages=stage)
        slowness = random.Random(seed * 10 + index).choice((0.25, 1.0, 3.0))
        delays = random_delays(seed * 10 + index, LONGEST_DELAY_S * slowness)
        rig.copier.up.delay = rig.copier.down.delay = delays
        if disk is not None:
            disk.reads.delay = disk.writes.delay = delays
        histories.append(StageHistory(rig, seed, seed * 10 + index, stage))
    return pipeline, histories


def run(pipeline: Pipeline, histories: list[StageHistory], n_passes: int) -> None:
    """Raises the first error of any stage; what others met because of it is no news."""
    errors: list[BaseException] = []

    def run_one(history: StageHistory) -> None:
        try:
            history.run(n_passes)
        except BaseException as error:
            errors.append(error)
            pipeline.fail()

    threads = [threading.Thread(target=run_one, args=(history,)) for history in histories]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for history in histories:
        history.rig.close()
    if errors:
        raise min(errors, key=lambda error: isinstance(error, StuckError))


def run_and_compare(seed: int, n_passes: int) -> Counter[str]:
    pipeline, histories = make_histories(seed)
    run(pipeline, histories, n_passes)
    first = histories[0]
    for other in histories[1:]:
        assert len(other.decided) == len(first.decided)
        for n_pass, (one, two) in enumerate(zip(first.decided, other.decided, strict=True)):
            assert one == two, f"stages have parted in pass {n_pass}"
    moved = first.rig.context.moved_bytes
    counts = Counter({f"{a.name} {b.name}": n for (a, b), n in moved.items()})
    counts["aborts"] = sum("abort" in line for line in first.log)
    return counts


@pytest.mark.parametrize("seed", range(N_HISTORIES))
def test_stages_decide_alike(seed: int) -> None:
    counts = run_and_compare(seed, N_PASSES)
    assert counts["DEVICE HOST"]


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_stages_decide_alike_in_many_histories() -> None:
    totals: Counter[str] = Counter()
    for seed in range(1000, 1150):
        totals += run_and_compare(seed, N_PASSES)
    print(totals)
    for edge in ("DEVICE HOST", "HOST DEVICE", "HOST DISK", "DISK HOST", "aborts"):
        assert totals[edge]


def test_a_stage_must_not_ask_earlier_than_the_others_can_have_come() -> None:
    """The lag is no caution: with less, the first stage waits for one that waits for it."""
    pipeline, histories = make_histories(3, lag=1)
    with pytest.raises(StuckError):
        run(pipeline, histories, 30)


def test_stages_that_go_by_their_own_figures_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """That the histories would show it; and that stages notice it themselves before long."""
    monkeypatch.setattr(StageOfPipeline, "give", lambda stage, values: lambda: values)
    with pytest.raises(AssertionError, match="parted"):
        run_and_compare(0, N_PASSES)


def test_a_copy_that_fails_on_one_stage_ends_it() -> None:
    pipeline, histories = make_histories(0)
    histories[1].load_error = OSError("on purpose")
    with pytest.raises(StagesPartedError):
        run(pipeline, histories, 400)
