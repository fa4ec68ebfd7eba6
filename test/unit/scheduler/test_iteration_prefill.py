"""When token objectives give way to the queue's first tokens, and how much prefill has its turn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from support_scheduler.iterations import COSTS, running, seconds
from support_simulation.builders import BLOCK_TOKENS, Queue
from tiered_kv.api.slo import Slo
from tiered_kv.core.device_spec import find_device
from tiered_kv.core.model_spec import find_model
from tiered_kv.scheduler.cost_model import CostModel
from tiered_kv.scheduler.iteration_config import IterationConfig
from tiered_kv.scheduler.iteration_policy import IterationPlan, IterationState, RunningRequest
from tiered_kv.scheduler.iteration_prefill import QUEUE_LOOK
from tiered_kv.scheduler.iteration_slack import SlackIterations
from tiered_kv.scheduler.plan import AdmissionPlan
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
    assert late == IterationPlan(is_hurried=True)
    asked = AdmissionPlan((1, 2), prefill_tokens=777, admit_at_most=2)
    assert late.limit(asked) == asked


def test_a_queue_is_late_of_which_everyone_alone_would_be_in_time() -> None:
    in_time = plan(running(*REQUESTS), [4 * ALONE_S])
    assert in_time.prefill_tokens
    assert plan(running(*REQUESTS), [4 * ALONE_S] * 4) == IterationPlan(is_hurried=True)


def test_nobody_is_parked_while_the_queue_is_late() -> None:
    assert plan(running(*TOO_MANY), [None]).decode is not None
    assert plan(running(*TOO_MANY), LATE) == IterationPlan(is_hurried=True)


def test_it_can_be_switched_off() -> None:
    strict = plan(running(*REQUESTS), LATE, IterationConfig(yields=False))
    assert strict.prefill_tokens


def test_only_the_first_of_a_long_queue_are_looked_at() -> None:
    beyond: list[float | None] = [None] * (QUEUE_LOOK - 1) + LATE
    assert plan(running(*REQUESTS), beyond).prefill_tokens
    assert plan(running(*REQUESTS), beyond[1:]) == IterationPlan(is_hurried=True)


# -- how much, and who ----------------------------------------------------------------------------

CPU = CostModel(find_model("SmolLM2-135M"), find_device("CPU-2"), {})
SHARED = range(2048 // BLOCK_TOKENS)
CACHED = len(SHARED) * BLOCK_TOKENS
#: Two were promised more than can be kept beside a prefill of any size, the others next to nothing.
MIXED = ((2, 2_000, 0.2), (6, 2_000, 5.0))


def on_cpu(
    ttft_s: float, requests: list[RunningRequest], *, n: int = 12, **more: Any
) -> IterationPlan:
    """`n` requests wait that add 16 tokens to a prefix on the device; a decode came last."""
    queue = Queue(FirstComeFirstServed())
    queue.cache(SHARED)
    for at in range(n):
        blocks = [*SHARED, 1000 + at]
        queue.arrive(1000 + at, blocks, tokens=CACHED + 16, slo=Slo(ttft_s=ttft_s))
    prefill = replace(queue.state(), costs=CPU, chunk_tokens=512)
    return SlackIterations().plan(IterationState(0.0, requests, CPU, prefill=prefill, **more))


def piece_s(n_requests: int) -> float:
    return CPU.iteration_s(((16, CACHED),) * n_requests, 0, 0)


def test_while_nobody_is_in_a_hurry_prefill_comes_in_pieces_that_delay_decodes_less() -> None:
    plan = on_cpu(60.0, running(*MIXED))
    assert plan.decode == (0, 1, 2), "parked although the pace can be kept between prefills only"
    assert not plan.is_hurried
    n = plan.admit_at_most
    assert n is not None
    assert plan.prefill_tokens == 16 * n
    assert 12 / n * piece_s(n) <= 2.0 * piece_s(12)
    assert piece_s(n) < piece_s(12) / 3.0


def test_in_a_hurry_it_takes_what_is_worth_a_pass_and_throughput_counts() -> None:
    all_s = CPU.iteration_s((), 16_000, 8)
    work_s = 12 * CPU.marginal_prefill_s(16, CACHED)
    plan = on_cpu(2.5 * (all_s + work_s), running(*MIXED))
    assert plan.is_hurried
    assert plan.decode is None
    n = plan.admit_at_most
    assert n is not None
    assert 12 / n * piece_s(n) <= 1.15 * piece_s(12)
    too_late = on_cpu(1.1 * work_s, running(*MIXED))
    assert too_late == IterationPlan(is_hurried=True), "then the request policy decides"


def test_between_two_turns_decodes_go_first_unless_all_that_waits_fits() -> None:
    waiting = on_cpu(60.0, running(*MIXED), decoded_last=False)
    assert waiting.prefill_tokens == 0
    patient = running((8, 2_000, 5.0))
    assert on_cpu(60.0, patient, decoded_last=False).prefill_tokens == 512


def test_who_is_in_a_hurry_is_remembered_for_the_decode_that_follows() -> None:
    requests = running(*MIXED)
    for hurried, decode in ((False, (0, 1, 2)), (True, None)):
        state = IterationState(0.0, requests, CPU, prefill_load=0.34, is_hurried=hurried)
        assert SlackIterations().plan(state).decode == decode


def test_those_admitted_fit_with_whole_pages() -> None:
    some, everyone = IterationPlan((1,), 40, admit_at_most=3), IterationPlan(None, 40, (), 3)
    assert limits(some, None, None) == limits(some, 10, 5) == (40, 3)
    assert limits(some, None, 2, page_tokens=64) == (40 + 3 * 63, 2)
    assert limits(everyone, 10, 5) == (10, 3)
    assert limits(everyone, 100, 5, page_tokens=64) == (100, 3)
    assert limits(IterationPlan(None, 0), None, None, page_tokens=64) == (0, None)


def limits(
    plan: IterationPlan, tokens: int | None, n: int | None, page_tokens: int = 1
) -> tuple[int | None, int | None]:
    asked = AdmissionPlan((7, 8), tokens, relegated=frozenset({8}), admit_at_most=n)
    limited = plan.limit(asked, page_tokens)
    assert replace(limited, prefill_tokens=tokens, admit_at_most=n) == asked
    return limited.prefill_tokens, limited.admit_at_most
