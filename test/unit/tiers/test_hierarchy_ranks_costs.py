"""Two ranks that run at different speeds learn the same costs, and so decide alike."""

from __future__ import annotations

import pytest

from support_tiers.costs import give_costs, page_s
from support_tiers.ranks import Ranks
from support_tiers.tier_rig import PAGE_SIZE, Rig, tokens_of
from tiered_kv.core.ids import Tier
from tiered_kv.scheduler.calibration import Calibrator, StepObservation

pytestmark = pytest.mark.timeout(60)

PROMPT = tokens_of(1, 2, 3, 4, tail=1)


def test_ranks_learn_the_times_of_the_slower_one(ranks: Ranks) -> None:
    models = [give_costs(rig) for rig in ranks]
    for rig, model in zip(ranks, models, strict=True):
        rig.context.calibrator = Calibrator(model)
    slow = ranks.rigs[1]
    slow.copier.down.delay = lambda: 0.01
    slow.disk.reads.delay = lambda: 0.02

    def step(rig: Rig) -> None:
        seconds = 4.0 if rig is slow else 1.0
        rig.hierarchy.observe_step(StepObservation(((100, 0),), 0, 0, seconds))

    for n in range(1, 9):
        prompt = tokens_of(10 * n, 10 * n + 1, tail=1)
        ranks.each(step)
        ranks.on_disk(prompt)
        ranks.prefetch("r", prompt)
    for source, target in (
        (Tier.DEVICE, Tier.HOST),
        (Tier.HOST, Tier.DISK),
        (Tier.DISK, Tier.HOST),
    ):
        costs = [model.edge(source, target) for model in models]
        assert costs[0] == costs[1]
    assert models[0].prefill_correction == models[1].prefill_correction
    n_bytes = 2 * slow.page_format.page_bytes
    assert models[0].load_s(Tier.DEVICE, Tier.HOST, n_bytes) > 0.005
    assert models[0].load_s(Tier.DISK, Tier.HOST, n_bytes) > 0.01
    ranks.each(Rig.check_idle)


def test_ranks_split_a_prefix_at_the_same_page(ranks: Ranks) -> None:
    for rig in ranks:
        give_costs(rig, load_page_s=page_s(rig))
    prompt = tokens_of(*range(1, 9), tail=1)
    ranks.serve(prompt)
    ranks.drain()
    ranks.each(Rig.drop_from_device)
    first, second = ranks.serve(prompt)
    assert first.n_host == second.n_host
    assert 3 * PAGE_SIZE <= first.n_host <= 5 * PAGE_SIZE


def test_ranks_lose_patience_together(ranks: Ranks) -> None:
    for rig in ranks:
        give_costs(rig)
    ranks.on_disk(PROMPT)
    slow = ranks.rigs[1]
    slow.disk.reads.hold()
    ranks.each(lambda rig: rig.arrive("r", PROMPT))
    ranks.each(lambda rig: rig.poll_until(lambda: rig.hierarchy.prefetch.done("r")))
    assert slow.reads.in_flight == 1, "it had not arrived on both"
    ranks.serve(PROMPT)
    ranks.each(lambda rig: rig.hierarchy.prefetch.release("r"))
    slow.disk.reads.release()
    ranks.drain()
    ranks.each(Rig.check_idle)
