"""When token objectives give way to the queue's first tokens."""

from __future__ import annotations

import pytest

from support_scheduler.iterations import COSTS, running, seconds
from support_simulation.builders import BLOCK_TOKENS, Queue
from tiered_kv.api.slo import Slo
from tiered_kv.scheduler.iteration_config import IterationConfig
from tiered_kv.scheduler.iteration_policy import IterationPlan, IterationState, RunningRequest
from tiered_kv.scheduler.iteration_prefill import QUEUE_LOOK
from tiered_kv.scheduler.iteration_slack import SlackIterations
from tiered_kv.scheduler.policies.fcfs import FirstComeFirstServed

N_BLOCKS = 200
ALONE_S = COSTS.marginal_prefill_s(N_BLOCKS * BLOCK_TOKENS + 1)
#: Decoding takes two thirds of what the tightest objective allows.
REQUESTS = ((20, 7_000, 0.025), (4, 7_000, 0.1))
#: The second class can take turns, so that the first is in time.
TOO_MANY = ((20, 12_000, 0.025), (20, 20_000, 0.1), (4, 40_000, None))
#: Both in time if nobody decoded, neither otherwise.
LATE: list[float | None] = [1.1 * ALONE_S, 2.2 * ALONE_S]


def plan(
    requests: list[RunningRequest],
    ttfts_s: list[float | None],
    config: IterationConfig | None = None,
) -> IterationPlan:
    queue = Queue(FirstComeFirstServed())
    for at, ttft_s in enumerate(ttfts_s):
        first = 10_000 * at
        queue.arrive(1000 + at, range(first, first + N_BLOCKS), slo=Slo(ttft_s=ttft_s))
    state = IterationState(0.0, requests, COSTS, prefill=queue.state())
    return SlackIterations(config).plan(state)


@pytest.mark.parametrize("ttft_s", [None, 30 * ALONE_S, 0.9 * ALONE_S])
def test_who_is_in_time_anyway_or_beyond_hope_changes_nothing(ttft_s: float | None) -> None:
    tokens = plan(running(*REQUESTS), [ttft_s]).prefill_tokens
    assert tokens
    chunk_s = COSTS.iteration_s(((tokens, 0),), 0, 0)
    assert chunk_s + seconds(running(*REQUESTS)) <= 0.025


def test_for_first_tokens_that_could_be_in_time_the_request_policy_decides() -> None:
    assert plan(running(*REQUESTS), [1.1 * ALONE_S]).prefill_tokens, "one is not worth it"
    late = plan(running(*REQUESTS), LATE)
    assert late == IterationPlan()
    assert late.limit_prefill(777) == 777


def test_a_queue_is_late_of_which_everyone_alone_would_be_in_time() -> None:
    in_time = plan(running(*REQUESTS), [4 * ALONE_S])
    assert in_time.prefill_tokens
    assert plan(running(*REQUESTS), [4 * ALONE_S] * 4) == IterationPlan()


def test_nobody_is_parked_while_the_queue_is_late() -> None:
    assert plan(running(*TOO_MANY), [None]).decode is not None
    assert plan(running(*TOO_MANY), LATE) == IterationPlan()


def test_it_can_be_switched_off() -> None:
    strict = plan(running(*REQUESTS), LATE, IterationConfig(yields=False))
    assert strict.prefill_tokens


def test_only_the_first_of_a_long_queue_are_looked_at() -> None:
    beyond: list[float | None] = [None] * (QUEUE_LOOK - 1) + LATE
    assert plan(running(*REQUESTS), beyond).prefill_tokens
    assert plan(running(*REQUESTS), beyond[1:]) == IterationPlan()
