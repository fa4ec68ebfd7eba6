"""What the operator says of programs reaches the policy that knows them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from tiered_kv.plugin.queue.install import make_policy
from tiered_kv.scheduler.policies.slack import SlackPolicy


def arguments(*, never_pause: bool = False, least_ttft_ms: float | None = None) -> Any:
    trust = SimpleNamespace(least_ttft_ms=least_ttft_ms)
    return SimpleNamespace(tiered_kv_never_pause=never_pause, trust=lambda: trust)


def test_programs_pause_unless_the_operator_says_otherwise() -> None:
    for never_pause in (False, True):
        policy = make_policy("slack", arguments(never_pause=never_pause))
        assert isinstance(policy, SlackPolicy)
        assert policy._config.working_set is not never_pause


def test_deadlines_of_tasks_keep_to_the_operators_limit() -> None:
    policy = make_policy("slack", arguments(least_ttft_ms=250.0))
    assert isinstance(policy, SlackPolicy)
    assert policy._config.least_ttft_s == 0.25


def test_other_policies_are_as_they_are() -> None:
    assert not isinstance(make_policy("fcfs", arguments()), SlackPolicy)
