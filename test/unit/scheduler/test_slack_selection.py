"""Who can be in time, against trying all subsets; and when tokens are due."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support_simulation.builders import Queue, cost_model
from tiered_kv.api.slo import Slo
from tiered_kv.core.ids import Tier
from tiered_kv.scheduler.request_policy import request_policies
from tiered_kv.scheduler.slack import Job, Price, least_token_slack_s, price, select_in_time

JOBS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 30)), max_size=7)


def jobs_of(pairs: list[tuple[int, int]]) -> list[Job]:
    jobs = [Job(index, float(work), float(due)) for index, (work, due) in enumerate(pairs)]
    return sorted(jobs, key=lambda job: job.deadline_s)


def all_in_time(jobs: tuple[Job, ...], now_s: float) -> bool:
    for job in jobs:
        now_s += job.work_s
        if now_s > job.deadline_s:
            return False
    return True


@settings(max_examples=300, deadline=None)
@given(JOBS, st.sampled_from([0.0, 3.0]))
def test_no_larger_set_could_be_in_time(pairs: list[tuple[int, int]], now_s: float) -> None:
    jobs = jobs_of(pairs)
    found = select_in_time(jobs, now_s)
    assert all_in_time(found.in_time, now_s)
    assert {*found.in_time, *found.left_out} == set(jobs)
    for larger in combinations(jobs, len(found.in_time) + 1):
        assert not all_in_time(larger, now_s)


def test_the_longest_is_left_out_unless_it_weighs_more() -> None:
    short, long = Job(1, 1.0, 2.5), Job(2, 2.0, 2.6)
    assert select_in_time([short, long], 0.0).in_time == (short,)
    heavy = Job(2, 2.0, 2.6, weight=3.0)
    assert select_in_time([short, heavy], 0.0).in_time == (heavy,)


def test_passes_that_take_longer_make_no_load_slower() -> None:
    both = Price(compute_s=0.5, load_s=2.0, work_s=2.0)
    assert (both.takes_s(1.0), both.takes_s(3.0), both.takes_s(8.0)) == (2.0, 2.0, 4.0)
    assert both.takes_s(1.0, queued_s=1.0) == 3.0
    assert Price(0.5, 0.0, 0.5).takes_s(2.0, queued_s=9.0) == 1.0, "nothing of it is loaded"


def test_a_price_counts_what_is_not_cached_and_what_must_be_loaded() -> None:
    q, costs = Queue(request_policies.get("fcfs")()), cost_model()
    q.cache([1, 2, 3, 4])
    q.cache([7, 8, 9, 10], Tier.HOST)
    new, on_device, on_host = (
        price(q.arrive(request_id, blocks), costs)
        for request_id, blocks in enumerate(([20, 21, 22, 23], [1, 2, 3, 4], [7, 8, 9, 10]))
    )
    assert new.load_s == on_device.load_s == 0.0
    assert on_host.load_s > 0.0
    assert on_device.compute_s == on_host.compute_s < new.compute_s / 50
    assert on_host.work_s == max(on_host.load_s, on_host.compute_s)


def test_tokens_are_due_by_the_first_one_and_who_is_behind_gets_one_interval() -> None:
    q = Queue(request_policies.get("fcfs")())
    request = q.arrive(0, [1], slo=Slo("interactive", 0.5, 0.05))
    request.first_token_s, request.output_tokens = 1.0, 10
    assert least_token_slack_s([request], 1.1, 1.1) == pytest.approx(0.4)
    assert least_token_slack_s([request], 2.0, 2.0) == pytest.approx(0.05)
    assert least_token_slack_s([request], 2.0, 1.98) == pytest.approx(0.03)
    assert least_token_slack_s([request], 2.0, 1.9) < 0.0
    assert least_token_slack_s([request], 1.1, 1.1, 0.8) == pytest.approx(0.3)
    other = q.arrive(1, [2], slo=Slo("standard", 2.0, 0.1))
    other.first_token_s, other.output_tokens = 1.05, 2
    assert least_token_slack_s([request, other], 1.1, 1.1) == pytest.approx(0.15)
    # Whatever is tighter than anybody could be served does not count.
    assert least_token_slack_s([request, other], 1.1, 1.1, 1.0, 0.06) == pytest.approx(0.15)
    assert least_token_slack_s([request, other], 1.1, 1.1, 0.5, 0.06) == float("inf")
    request.slo = other.slo = Slo("batch", 30.0, None)
    assert least_token_slack_s([request, other], 1.1, 1.1) == float("inf")
