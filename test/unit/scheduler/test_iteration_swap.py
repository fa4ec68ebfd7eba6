"""Who makes room, and what prefill may take of an iteration."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from support_scheduler.iterations import COSTS, running, seconds
from support_simulation.builders import Queue
from tiered_kv.api.slo import NO_SLO, Slo
from tiered_kv.scheduler.iteration_policy import IterationState, RunningRequest
from tiered_kv.scheduler.iteration_slack import SlackIterations
from tiered_kv.scheduler.iteration_swap import choose_swap_out
from tiered_kv.scheduler.policies.fcfs import FirstComeFirstServed


def test_the_loosest_objective_makes_room_first() -> None:
    requests = running((2, 1_000, 0.025), (2, 1_000, 0.1), (2, 1_000, None))
    assert set(choose_swap_out(requests, 1_500, None)) == {4, 5}
    assert set(choose_swap_out(requests, 2_500, None)[:2]) == {4, 5}
    assert choose_swap_out(requests, 1, 0.025)[0] in {4, 5}


def test_nobody_makes_way_for_who_is_no_more_urgent() -> None:
    requests = running((4, 1_000, 0.025), (2, 1_000, 0.1))
    assert choose_swap_out(requests, 100, 0.1) == ()
    assert choose_swap_out(requests, 100, math.inf) == ()
    assert len(choose_swap_out(requests, 100, 0.025)) == 1


def test_nobody_makes_way_in_vain() -> None:
    requests = running((2, 1_000, 0.025), (2, 1_000, None))
    assert choose_swap_out(requests, 2_001, 0.025) == ()
    assert len(choose_swap_out(requests, 2_000, 0.025)) == 2


def test_one_stays_where_those_who_run_lack_memory() -> None:
    requests = running((3, 1_000, None))
    assert len(choose_swap_out(requests, 10_000, None)) == 2


def test_what_the_host_has_already_is_cheap_to_move() -> None:
    requests = running((3, 1_000, None))
    requests[1].host_tokens = 900
    assert choose_swap_out(requests, 500, None) == (1,)


def test_shared_tokens_are_not_freed_and_some_requests_stay() -> None:
    requests = running((3, 1_000, None))
    requests[0].gang, requests[0].shared_tokens = 7, 1_000
    requests[1].can_swap = False
    assert choose_swap_out(requests, 500, None) == (2,)
    requests[2].can_park = False
    assert choose_swap_out(requests, 500, None) == ()


@pytest.mark.parametrize("seed", range(20))
def test_no_one_goes_who_is_not_needed(seed: int) -> None:
    random = np.random.default_rng(seed)
    requests = [
        RunningRequest(at, int(random.integers(1, 5_000)), 0.0, weight=float(random.random()))
        for at in range(12)
    ]
    short = int(random.integers(1, 20_000))
    gone = choose_swap_out(requests, short, 0.01)
    freed = {r.request_id: r.freed_tokens for r in requests}
    if sum(freed.values()) < short:
        assert gone == ()
        return
    assert sum(freed[request_id] for request_id in gone) >= short
    for fewer in itertools.combinations(gone, len(gone) - 1):
        assert sum(freed[request_id] for request_id in fewer) < short


def test_who_is_swapped_out_does_not_decode() -> None:
    requests = running((20, 12_000, 0.025), (30, 20_000, None))
    state = IterationState(0.0, requests, COSTS, short_tokens=100_000)
    plan = SlackIterations().plan(state)
    assert len(plan.swap_out) == 5
    assert plan.decode is None or not set(plan.swap_out) & set(plan.decode)


# -- prefill --------------------------------------------------------------------------------------


def prefill_tokens(
    requests: list[RunningRequest],
    now_s: float,
    slo: Slo = NO_SLO,
    *,
    decoded_last: bool = True,
) -> int:
    queue = Queue(FirstComeFirstServed())
    queue.turns.passed(now_s, 0.0, decoded=decoded_last)
    queue.arrive(1000, range(200), slo=slo)
    prefill = queue.state()
    room = SlackIterations().plan(IterationState(now_s, requests, COSTS, prefill=prefill)).room
    assert room is not None
    return prefill.chunk_tokens if room.tokens is None else room.tokens


def test_prefill_takes_what_the_tokens_due_leave() -> None:
    requests = running((20, 8_000, 0.05), (10, 8_000, None))
    tokens = prefill_tokens(requests, 0.0)
    assert tokens
    left_s = 0.94 * 0.05 - seconds(requests)
    assert COSTS.iteration_s(((tokens, 0),), 0, 0) <= left_s
    assert COSTS.iteration_s(((tokens + 128, 0),), 0, 0) > left_s


def test_prefill_waits_for_a_decode_when_no_time_is_left_but_has_its_turn_after() -> None:
    requests = running((40, 12_000, 0.025))
    assert prefill_tokens(requests, 0.0, decoded_last=False) == 0
    turn = prefill_tokens(requests, 0.0)
    assert 64 <= turn <= 512


def test_nothing_to_prefill_is_no_question() -> None:
    requests = running((20, 8_000, 0.05))
    assert SlackIterations().plan(IterationState(0.0, requests, COSTS)).room is None


def test_prefill_and_the_decodes_beside_it_share_one_iteration() -> None:
    requests = running((20, 12_000, 0.025), (20, 20_000, 0.1), (4, 40_000, None))
    queue = Queue(FirstComeFirstServed())
    queue.arrive(1000, range(200))
    state = IterationState(0.0, requests, COSTS, prefill=queue.state(), is_mixed=True)
    plan = SlackIterations().plan(state)
    assert plan.decode
    assert plan.room
    assert plan.room.tokens
    batch = [requests[request_id] for request_id in plan.decode]
    n_new = plan.room.tokens - len(batch)
    context = sum(request.context_tokens for request in batch)
    assert n_new >= 64
    assert COSTS.iteration_s(((n_new, 0),), context, len(batch)) <= 0.025


def test_with_an_objective_for_first_tokens_prefills_stay_short() -> None:
    requests = running((4, 1_000, None))
    short = prefill_tokens(requests, 0.0, Slo(ttft_s=0.5))
    long = prefill_tokens(requests, 0.0)
    assert 0 < short < long
    assert COSTS.iteration_s(((short, 0),), 0, 0) <= 0.05
