"""When token objectives give way to the queue's first tokens, and how much prefill has its turn."""

from __future__ import annotations

from dataclasses import replace

import pytest

from support_scheduler.iterations import COSTS, running, seconds
from support_simulation.builders import BLOCK_TOKENS, Queue
from tiered_kv.api.slo import Slo
from tiered_kv.core.device_spec import find_device
from tiered_kv.core.model_spec import find_model
from tiered_kv.scheduler.cost_model import CostModel
from tiered_kv.scheduler.iteration_config import IterationConfig
from tiered_kv.scheduler.iteration_policy import IterationPlan, IterationState, RunningRequest
from tiered_kv.scheduler.iteration_slack import SlackIterations
from tiered_kv.scheduler.plan import NO_LIMIT, AdmissionPlan, PrefillRoom
from tiered_kv.scheduler.policies.fcfs import FirstComeFirstServed
from tiered_kv.scheduler.policies.slack import SlackPolicy
from tiered_kv.scheduler.policies.slack_config import SlackConfig
from tiered_kv.scheduler.prefill_room import DECODES_AHEAD
from tiered_kv.scheduler.prompts_ahead import QUEUE_LOOK

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


def tokens_of(plan: IterationPlan) -> int | None:
    assert plan.room is not None
    return plan.room.tokens


@pytest.mark.parametrize("ttft_s", [None, 30 * ALONE_S, 0.9 * ALONE_S])
def test_who_is_in_time_anyway_or_beyond_hope_changes_nothing(ttft_s: float | None) -> None:
    tokens = tokens_of(plan(running(*REQUESTS), [ttft_s]))
    assert tokens
    chunk_s = COSTS.iteration_s(((tokens, 0),), 0, 0)
    assert chunk_s + seconds(running(*REQUESTS)) <= 0.025


def test_for_first_tokens_that_could_be_in_time_the_request_policy_decides() -> None:
    assert tokens_of(plan(running(*REQUESTS), [1.1 * ALONE_S])), "one is not worth it"
    late = plan(running(*REQUESTS), LATE)
    assert late == IterationPlan(is_hurried=True)
    asked = AdmissionPlan((1, 2), room=PrefillRoom(777, 2))
    carried_out = asked.within(late.room)
    assert (carried_out.prefill_tokens, carried_out.admit_at_most) == (777, 2)


def test_a_queue_is_late_of_which_everyone_alone_would_be_in_time() -> None:
    in_time = plan(running(*REQUESTS), [4 * ALONE_S])
    assert tokens_of(in_time)
    assert plan(running(*REQUESTS), [4 * ALONE_S] * 4) == IterationPlan(is_hurried=True)


def test_nobody_is_parked_while_the_queue_is_late() -> None:
    assert plan(running(*TOO_MANY), [None]).decode is not None
    assert plan(running(*TOO_MANY), LATE) == IterationPlan(is_hurried=True)


def test_it_can_be_switched_off() -> None:
    strict = plan(running(*REQUESTS), LATE, IterationConfig(yields=False))
    assert tokens_of(strict)


def test_only_the_first_of_a_long_queue_are_looked_at() -> None:
    beyond: list[float | None] = [None] * (QUEUE_LOOK - 1) + LATE
    assert tokens_of(plan(running(*REQUESTS), beyond))
    assert plan(running(*REQUESTS), beyond[1:]) == IterationPlan(is_hurried=True)


# -- how much, and who ----------------------------------------------------------------------------

CPU = CostModel(find_model("SmolLM2-135M"), find_device("CPU-2"), {})
#: Three decodes leave room for a prefill that is worth a pass.
TBT_S = 0.65 * (COSTS.iteration_s((), 70, 1) + COSTS.iteration_s(((256, 0),), 0, 0))
SHARED = range(2048 // BLOCK_TOKENS)
CACHED = len(SHARED) * BLOCK_TOKENS
#: Two were promised more than can be kept beside a prefill of any size, the others next to nothing.
MIXED = ((2, 2_000, 0.2), (6, 2_000, 5.0))


def on_cpu(
    ttft_s: float,
    requests: list[RunningRequest],
    *,
    decoded_last: bool = True,
    page_tokens: int = 1,
) -> IterationPlan:
    """Twelve requests wait that add 16 tokens each to a prefix on the device."""
    n = 12
    queue = Queue(FirstComeFirstServed())
    queue.turns.passed(0.0, 0.0, decoded=decoded_last)
    queue.cache(SHARED)
    for at in range(n):
        blocks = [*SHARED, 1000 + at]
        queue.arrive(1000 + at, blocks, tokens=CACHED + 16, slo=Slo(ttft_s=ttft_s))
    prefill = replace(queue.state(), costs=CPU, chunk_tokens=512, page_tokens=page_tokens)
    return SlackIterations().plan(IterationState(0.0, requests, CPU, prefill=prefill))


def piece_s(n_requests: int) -> float:
    return CPU.iteration_s(((16, CACHED),) * n_requests, 0, 0)


def test_while_nobody_is_in_a_hurry_prefill_comes_in_pieces_that_delay_decodes_less() -> None:
    plan = on_cpu(60.0, running(*MIXED))
    assert plan.decode == (0, 1, 2), "parked although the pace can be kept between prefills only"
    assert not plan.is_hurried
    assert plan.room is not None
    n = plan.room.admit_at_most
    assert n is not None
    assert plan.room.tokens == 16 * n
    paged = on_cpu(60.0, running(*MIXED), page_tokens=64)
    assert paged.room == PrefillRoom(16 * n + 63 * n, n), "whole pages of each are counted"
    assert 12 / n * piece_s(n) <= 2.0 * piece_s(12)
    assert piece_s(n) < piece_s(12) / 3.0


def test_in_a_hurry_it_takes_what_is_worth_a_pass_and_throughput_counts() -> None:
    all_s = CPU.iteration_s((), 16_000, 8)
    work_s = 12 * CPU.marginal_prefill_s(16, CACHED)
    plan = on_cpu(2.5 * (all_s + work_s), running(*MIXED))
    assert plan.is_hurried
    assert plan.decode is None
    assert plan.room is not None
    n = plan.room.admit_at_most
    assert n is not None
    assert 12 / n * piece_s(n) <= 1.15 * piece_s(12)
    too_late = on_cpu(1.1 * work_s, running(*MIXED))
    assert too_late == IterationPlan(is_hurried=True), "then the request policy decides"


def test_between_two_turns_decodes_go_first_unless_all_that_waits_fits() -> None:
    waiting = on_cpu(60.0, running(*MIXED), decoded_last=False)
    assert waiting.room == PrefillRoom(0)
    patient = running((8, 2_000, 5.0))
    assert on_cpu(60.0, patient, decoded_last=False).room == NO_LIMIT


def test_who_is_in_a_hurry_is_remembered_for_the_decode_that_follows() -> None:
    requests = running(*MIXED)
    for hurried, decode in ((False, (0, 1, 2)), (True, None)):
        state = IterationState(0.0, requests, CPU, prefill_load=0.34, is_hurried=hurried)
        assert SlackIterations().plan(state).decode == decode


def test_nothing_that_could_be_computed_is_no_question() -> None:
    queue = Queue(FirstComeFirstServed())
    queue.arrive(1000, range(100))
    queue.hold(1000)
    state = IterationState(0.0, running(*REQUESTS), COSTS, prefill=queue.state())
    assert SlackIterations().plan(state).room is None


def test_one_room_takes_the_place_of_the_other_and_who_waits_limits_both() -> None:
    asked = AdmissionPlan((7, 8), room=PrefillRoom(0, 0))
    assert limits(asked, None) == (0, 0)
    assert limits(asked, NO_LIMIT) == (None, None)
    assert limits(asked, PrefillRoom(40, 3)) == (40, 3)
    due = replace(asked, prefill_tokens=30, admit_at_most=2)
    assert limits(due, PrefillRoom(40, 3)) == (30, 2)
    assert limits(due, PrefillRoom(20, 1)) == (20, 1)
    assert limits(due, NO_LIMIT) == (30, 2)


def limits(plan: AdmissionPlan, room: PrefillRoom | None) -> tuple[int | None, int | None]:
    carried_out = plan.within(room)
    assert replace(carried_out, prefill_tokens=None, admit_at_most=None) == replace(
        plan, prefill_tokens=None, admit_at_most=None
    )
    return carried_out.prefill_tokens, carried_out.admit_at_most


def test_neither_policy_stops_the_turn_that_the_other_grants() -> None:
    """Everyone decodes; the request policy would wait for room, of which there is some by now.

    It is the same rule: with the same running requests both say the same.
    """
    for in_a_row, waits in ((0, True), (DECODES_AHEAD, False)):
        policy = SlackPolicy(SlackConfig(mix_decodes=False, pass_share=10.0))
        queue = Queue(policy)
        queue.arrive(0, range(100, 300), slo=Slo(ttft_s=30.0))
        one = queue.arrive(1, [1], slo=Slo(tbt_s=TBT_S))
        queue.admit(1)
        one.output_tokens, one.first_token_s = 5, 10.0 - 4 * TBT_S
        queue.now_s, queue.running = 10.0, [one]
        queue.turns.passed(10.0, 1.0, decoded=True, n=in_a_row)
        state = queue.state()
        requests = [RunningRequest(1, one.prompt_tokens + 5, 10.0, TBT_S)]
        iteration = SlackIterations(IterationConfig(pass_share=10.0)).plan(
            IterationState(10.0, requests, COSTS, prefill=state)
        )
        room = policy.plan(state, 16).room
        assert iteration.decode is None
        assert (room.tokens == 0) is waits
        assert iteration.room is not None
        assert (iteration.room.tokens == 0) is waits
