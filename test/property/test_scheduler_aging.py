"""Nobody starves: the bound of `support_scheduler.starvation`, against an adversary."""

from __future__ import annotations

import pytest
from tqdm import tqdm

from support_scheduler.starvation import Adversary
from tiered_kv.scheduler.policies.slack_config import SlackConfig
from tiered_kv.scheduler.working_set import WorkingSet


@pytest.mark.parametrize("is_short_of_memory", [True, False])
@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_no_overdue_request_waits_for_more_than_its_bound(
    share: float, is_short_of_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    paused: list[bool] = []
    pauses = WorkingSet.pauses
    monkeypatch.setattr(
        WorkingSet, "pauses", lambda *asked: paused.append(pauses(*asked)) or paused[-1]
    )
    config = SlackConfig(max_wait_s=20.0, overdue_share=share)
    adversary = Adversary(int(100 * share), 4000, config, is_short_of_memory=is_short_of_memory)
    outcome = adversary.run()
    assert outcome.broken == []
    assert outcome.n_overdue > 500
    # It was not without a try of everything.
    tries = [outcome.n_never_came, outcome.n_passed_over, outcome.n_blocked, outcome.n_put_back]
    assert min(*tries, outcome.n_retracted, outcome.n_aborted) > 0, outcome
    assert (outcome.n_did_not_fit > 0) == is_short_of_memory
    assert any(paused) or not is_short_of_memory


def test_without_aging_the_same_adversary_starves_somebody() -> None:
    """Else the test above could not fail."""
    config = SlackConfig(max_wait_s=20.0, aging=False)
    outcome = Adversary(25, 7000, config).run()
    assert outcome.broken


def test_an_executor_that_goes_past_whose_turn_it_is_starves_somebody() -> None:
    config = SlackConfig(max_wait_s=20.0, overdue_share=1.0)
    adversary = Adversary(100, 4000, config, is_short_of_memory=False, passes_anybody=True)
    assert adversary.run().broken


@pytest.mark.long
@pytest.mark.timeout(14400)
@pytest.mark.parametrize("is_short_of_memory", [True, False])
def test_no_overdue_request_of_a_million_waits_for_more_than_its_bound(
    is_short_of_memory: bool,
) -> None:
    """Half a million at a time."""
    n = 500_000
    config = SlackConfig(max_wait_s=20.0)
    adversary = Adversary(1, n, config, is_short_of_memory=is_short_of_memory)
    with tqdm(total=n, unit=" requests") as bar:
        outcome = adversary.run(lambda more: _advance(bar, more))
    assert outcome.broken == []
    print(outcome)


def _advance(bar: tqdm, n: int) -> None:
    bar.update(n)
