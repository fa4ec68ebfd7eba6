"""Who decodes: against what the cost model says each choice takes."""

from __future__ import annotations

import time

import pytest

from support_scheduler.iterations import COSTS, chosen, decode, running, seconds
from tiered_kv.core.errors import ConfigError
from tiered_kv.scheduler.iteration_config import IterationConfig
from tiered_kv.scheduler.iteration_pace import find_pace, max_park_s, throughput_share
from tiered_kv.scheduler.iteration_policy import (
    EVERYONE,
    AllDecode,
    IterationState,
    RunningRequest,
    RunningTotals,
    iteration_policies,
)
from tiered_kv.scheduler.iteration_round_robin import RoundRobin
from tiered_kv.scheduler.iteration_slack import SlackIterations

# All together they take 31 ms; the first class alone takes 14 ms.
MIXED = ((20, 12_000, 0.025), (20, 20_000, 0.1), (4, 40_000, None))


def totals_of(requests: list[RunningRequest]) -> RunningTotals:
    totals = RunningTotals()
    for request in requests:
        totals.add(request.tbt_s, request.context_tokens)
    return totals


def test_everyone_decodes_while_that_is_in_time() -> None:
    requests = running((20, 4_000, 0.025), (10, 4_000, None))
    assert seconds(requests) < 0.02
    assert SlackIterations().plan(IterationState(0.0, requests, COSTS)) == EVERYONE
    assert SlackIterations().fits(totals_of(requests), COSTS, 0.0)


@pytest.mark.parametrize("n", [1, 40, 80, 120])
def test_who_fits_by_totals_fits_one_by_one(n: int) -> None:
    requests = running((n, 6_000, 0.025), (n, 1_000, 0.5), (n // 4, 3_000, None))
    policy = SlackIterations()
    if policy.fits(totals_of(requests), COSTS, 0.0):
        assert policy.plan(IterationState(0.0, requests, COSTS)) == EVERYONE
    else:
        assert seconds(requests) > IterationConfig().caution * 0.025


def test_totals_follow_who_comes_and_goes() -> None:
    totals = RunningTotals()
    totals.add(0.05, 100)
    totals.add(0.02, 10)
    totals.add(None, 1)
    totals.decoded(3.0)
    assert (totals.n, totals.context_tokens, totals.tightest_tbt_s) == (3, 114, 0.02)
    totals.remove(0.02, 11)
    assert (totals.tightest_tbt_s, totals.decoded_s) == (0.05, 3.0)
    with pytest.raises(KeyError):
        totals.remove(0.02, 11)


def test_the_look_at_totals_takes_less_than_50_microseconds() -> None:
    totals = totals_of(running((150, 500, 0.05), (80, 500, 0.1), (26, 500, None)))
    policy = SlackIterations()
    best_s = float("inf")
    for _ in range(20):
        start_s = time.perf_counter()
        for _ in range(100):
            policy.fits(totals, COSTS, 0.0)
        best_s = min(best_s, (time.perf_counter() - start_s) / 100)
    assert best_s < 50e-6


def test_the_tightest_decode_every_time_and_all_others_keep_their_pace() -> None:
    requests = running(*MIXED)
    tight, middle, batch = requests[:20], requests[20:40], requests[40:]
    assert seconds(tight) < 0.0235 < seconds(requests)

    everyone = decode(AllDecode(), running(*MIXED), 5.0)
    assert everyone.worst_s(tight) > 0.03

    result = decode(SlackIterations(), requests, 5.0)
    assert result.worst_s(tight) <= 0.025
    assert result.worst_s(middle) <= 0.1
    assert result.worst_s(batch) <= 1.0 + 0.025


def test_the_throughput_given_up_is_what_the_bytes_say() -> None:
    everyone = decode(AllDecode(), running(*MIXED), 10.0)
    result = decode(SlackIterations(), running(*MIXED), 10.0)
    # Tokens of KV read, as contexts differ.
    contexts = {r.request_id: r.context_tokens for r in running(*MIXED)}
    read = [
        sum(contexts[request_id] * len(gaps) for request_id, gaps in run.gaps_s.items()) / run.end_s
        for run in (everyone, result)
    ]
    fixed_s = seconds([RunningRequest(0, 0, 0.0)])
    said = throughput_share(fixed_s, 0.0235, seconds(running(*MIXED)))
    # An iteration ends where the next whole context does not fit.
    assert said - 0.06 <= read[1] / read[0] <= said + 0.01


def test_with_one_class_nobody_is_parked_however_late() -> None:
    requests = running((100, 8_000, 0.025))
    assert seconds(requests) > 0.03
    assert chosen(SlackIterations(), requests, 0.0) == requests


def test_nobody_is_parked_for_an_objective_that_cannot_be_met() -> None:
    requests = running((1, 8_000, 0.004), (60, 12_000, 0.1))
    assert chosen(SlackIterations(), requests, 0.0) == requests


def test_nobody_is_parked_for_one_of_many_while_prompts_want_the_time() -> None:
    """It would cost more than it brings, unless that one weighs more."""
    requests = running((1, 2_000, 0.01), (60, 12_000, None))
    hurry = {"prefill_load": 0.2, "is_hurried": True}
    assert chosen(SlackIterations(), requests, 0.0, **hurry) == requests
    requests[0].weight = 1000.0
    few = chosen(SlackIterations(), requests, 0.0, **hurry)
    assert requests[0] in few
    assert len(few) < 61


def test_where_nobody_wants_the_time_one_of_many_is_served_within_a_limit() -> None:
    requests = running((1, 2_000, 0.01), (60, 12_000, None))
    few = chosen(SlackIterations(), requests, 0.0)
    assert requests[0] in few
    assert len(few) < 61
    fixed_s = COSTS.iteration_s((), 0, 1)
    share = throughput_share(fixed_s, IterationConfig().caution * 0.01, seconds(requests))
    config = IterationConfig(least_throughput=share + 0.01)
    assert chosen(SlackIterations(config), requests, 0.0) == requests


def test_relegation_saves_most_of_a_class_that_cannot_be_in_time_as_a_whole() -> None:
    classes = ((60, 8_000, 0.025), (30, 8_000, 0.1), (10, 8_000, None))
    late = decode(SlackIterations(), running(*classes), 3.0)
    assert late.worst_s(running(*classes)[:60]) > 0.03

    policy = SlackIterations(IterationConfig(relegate=True))
    requests = running(*classes)
    pace = find_pace(requests, COSTS, policy.config, 0.0)
    assert 0 < len(pace.relegated) <= 15
    result = decode(policy, requests, 3.0)
    kept = [r for r in requests[:60] if r.request_id not in pace.relegated]
    assert len(kept) >= 45
    for request in kept:
        gaps = result.gaps_s[request.request_id]
        assert sum(gap <= 0.025 for gap in gaps) >= 0.98 * len(gaps)


def test_who_can_not_be_parked_never_is() -> None:
    requests = running(*MIXED)
    for request in requests[38:42]:
        request.can_park = False
    for now_s in (0.0, 0.01, 0.02, 5.0):
        assert set(requests[38:42]) <= set(chosen(SlackIterations(), requests, now_s))


def test_gangs_stay_together_where_their_prefix_is_read_once() -> None:
    requests = running((10, 12_000, 0.025), (80, 36_000, None))
    for request in requests[10:]:
        request.gang, request.shared_tokens = request.request_id % 8, 32_000
        request.last_token_s = -0.1 * (request.request_id // 8 % 2)
    for request in requests[:10]:
        request.weight = 5.0
    assert seconds(requests, is_cascade=True) > 0.0235
    batch = chosen(SlackIterations(), requests, 0.0, is_cascade=True)
    gangs = {r.gang: sum(m.gang == r.gang for m in batch) for r in batch if r.gang is not None}
    assert len(gangs) >= 1
    assert sum(n == 10 for n in gangs.values()) >= len(gangs) - 1
    assert seconds(batch, is_cascade=True) <= 0.0235

    alone = chosen(SlackIterations(), requests, 0.0)
    assert len(alone) < len(batch)


def test_the_overdue_decode_whatever_the_time() -> None:
    requests = running(*MIXED)
    requests[-1].context_tokens = 400_000
    requests[-1].last_token_s = -1.0
    assert requests[-1] in chosen(SlackIterations(), requests, 0.0)
    requests[-1].max_park_s = 5.0
    assert requests[-1] not in chosen(SlackIterations(), requests, 0.001)


def test_nobody_is_overdue_before_the_token_that_was_promised() -> None:
    config = IterationConfig(max_park_s=1.0)
    for tbt_s, bound_s in ((None, 1.0), (0.05, 1.0), (3.0, 3.0)):
        (request,) = running((1, 8_000, tbt_s))
        assert max_park_s(request, config) == bound_s
        request.max_park_s = 0.5
        assert max_park_s(request, config) == 0.5, "its own bound comes first"


def test_turns_by_age_reach_everyone() -> None:
    requests = running(*MIXED)
    result = decode(RoundRobin(), requests, 2.0)
    assert result.worst_s(requests) < 0.1
    # But where all have the same objective, turns make all later than they would be together.
    same = running((100, 8_000, 0.025))
    assert decode(RoundRobin(), same, 2.0).worst_s(same) > 1.3 * seconds(same)


def test_an_unknown_policy_is_refused_with_the_known_ones() -> None:
    assert iteration_policies.names() == ["all", "round-robin", "slack"]
    with pytest.raises(ConfigError, match="round-robin, slack"):
        iteration_policies.get("best")


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_park_s": 0.0},
        {"caution": 1.5},
        {"prefill_share": 2.0},
        {"pass_share": 0.0},
    ],
)
def test_options_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        IterationConfig(**wrong)  # type: ignore[arg-type]
