"""Nobody is parked for longer than the bound, whatever comes, goes and takes longer than predicted.

The bound: `max_park_s`, and the pass that is under way when it is reached, a prefill in its turn,
and the pass in which it decodes. docs/scheduler.md says why.
"""

from __future__ import annotations

import pytest

from support_scheduler.iterations import Adversary
from tiered_kv.scheduler.iteration_config import IterationConfig
from tiered_kv.scheduler.iteration_slack import SlackIterations

MAX_PARK_S = 0.3


def policy(**more: object) -> SlackIterations:
    return SlackIterations(IterationConfig(max_park_s=MAX_PARK_S, **more))  # type: ignore[arg-type]


@pytest.mark.parametrize("relegate", [False, True])
def test_the_bound_on_parking_holds(relegate: bool) -> None:
    adversary = Adversary(policy(relegate=relegate), 1, MAX_PARK_S)
    adversary.run(2_000)
    assert adversary.n_parked > 500
    assert adversary.broken == []


def test_without_it_the_same_adversary_starves_somebody() -> None:
    """Else the test above could not fail."""
    endless = SlackIterations(IterationConfig(max_park_s=1e9, relegate=True))
    adversary = Adversary(endless, 1, MAX_PARK_S)
    adversary.run(2_000)
    assert adversary.broken


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_bound_on_parking_holds_for_long() -> None:
    for seed in range(8):
        adversary = Adversary(policy(relegate=seed % 2 == 0), seed, MAX_PARK_S)
        adversary.run(25_000)
        assert adversary.n_parked > 10_000
        assert adversary.broken == []
        print(f"seed {seed}: at most {adversary.worst_share:.2f} of the bound")
