"""Nobody starves: the bound of `support_scheduler.starvation`, against an adversary."""

from __future__ import annotations

import pytest
from tqdm import tqdm

from support_scheduler.starvation import Adversary
from tiered_kv.scheduler.policies.slack_config import SlackConfig


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_no_overdue_request_waits_for_more_than_its_bound(share: float) -> None:
    config = SlackConfig(max_wait_s=20.0, overdue_share=share)
    outcome = Adversary(int(100 * share), 7000, config).run()
    assert outcome.n_admitted == 7000
    assert outcome.n_overdue > 500
    assert outcome.broken == []


def test_without_aging_the_same_adversary_starves_somebody() -> None:
    """Else the test above could not fail."""
    config = SlackConfig(max_wait_s=20.0, aging=False)
    outcome = Adversary(25, 7000, config).run()
    assert outcome.broken


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_no_overdue_request_of_a_million_waits_for_more_than_its_bound() -> None:
    n = 1_000_000
    adversary = Adversary(1, n, SlackConfig(max_wait_s=20.0))
    with tqdm(total=n, unit=" requests") as bar:
        outcome = adversary.run(lambda more: _advance(bar, more))
    assert outcome.n_admitted == n
    assert outcome.broken == []
    print(f"{outcome.n_overdue} overdue, at most {outcome.longest_share:.2f} of the bound")


def _advance(bar: tqdm, n: int) -> None:
    bar.update(n)
