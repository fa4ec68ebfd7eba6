"""The one rule for prefill's turn, and how long a pass may be for the sake of who may arrive.

Guarantee: short against their objectives where that costs nothing worth mentioning; a prompt is
never cut into pieces that take noticeably longer than the whole. Prefill has its turn after each
decode, but for a few that gain it room.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from support_simulation.builders import Queue
from tiered_kv.api.slo import NO_SLO, Slo
from tiered_kv.core.device_spec import find_device
from tiered_kv.core.model_spec import find_model
from tiered_kv.scheduler.cost_model import CostModel
from tiered_kv.scheduler.everyone_decodes import EveryoneDecodes
from tiered_kv.scheduler.iteration_batch import Packing
from tiered_kv.scheduler.plan import NO_LIMIT, PrefillRoom
from tiered_kv.scheduler.policies.fcfs import FirstComeFirstServed
from tiered_kv.scheduler.policies.slack_config import SlackConfig
from tiered_kv.scheduler.prefill_room import (
    CUTTING_SHARE,
    DECODES_AHEAD,
    PATIENT_SHARE,
    WORTH_SHARE,
    Decodes,
    MeanPace,
    room_before,
    room_beside,
)
from tiered_kv.scheduler.prompts_ahead import PromptsAhead
from tiered_kv.scheduler.request_policy import SchedulerState

GPU = CostModel(find_model("Llama-3.1-8B"), find_device("H200-141"), {})
CPU = CostModel(find_model("SmolLM2-135M"), find_device("CPU-2"), {})


def state(
    costs: CostModel, chunk_tokens: int, *waiting: int, ttft_s: float | None = None
) -> SchedulerState:
    """Prompts of so many tokens wait; prefill ran last."""
    queue = Queue(FirstComeFirstServed())
    for at, tokens in enumerate(waiting):
        queue.arrive(at, [1000 + at], tokens=tokens, slo=Slo(ttft_s=ttft_s))
    queue.turns.passed(0.0, 0.1, decoded=False)
    return replace(queue.state(), costs=costs, chunk_tokens=chunk_tokens)


def limit_s(
    costs: CostModel, chunk_tokens: int, cached: int, wanted_s: float, decode_s: float = 0.0
) -> float:
    """Of a long prompt that goes on, for the sake of who may arrive."""
    queue = Queue(FirstComeFirstServed())
    queue.arrive(0, [1], slo=Slo(ttft_s=1.0) if wanted_s < math.inf else NO_SLO)
    begun = queue.arrive(1, [2], tokens=100_000)
    queue.admit(1)
    begun.prefilled_tokens = cached
    begun_state = replace(queue.state(), costs=costs, chunk_tokens=chunk_tokens, unfinished=begun)
    nobody = Packing(costs, is_cascade=False)
    decodes = Decodes(nobody, decode_s, 1e9)
    return room_beside(begun_state, decodes, SlackConfig(pass_share=wanted_s)).seconds


def pieces_s(costs: CostModel, tokens: int, whole: int) -> float:
    return sum(costs.iteration_s(((tokens, done),), 0, 0) for done in range(0, whole, tokens))


def test_a_gpu_cuts_as_short_as_the_objectives_want() -> None:
    assert limit_s(GPU, 8192, 0, 0.05) == 0.05
    # Two decodes of all who run come in between anyway.
    assert limit_s(GPU, 8192, 0, 0.05, 0.04) == 0.08


def test_but_not_into_pieces_that_the_weights_are_read_for() -> None:
    long_s = limit_s(GPU, 8192, 0, 0.001)
    tokens = next(n for n in (256, 512, 1024, 2048) if GPU.iteration_s(((n, 0),), 0, 0) >= 0.02)
    assert 0.01 < long_s < 0.05
    whole_s = GPU.iteration_s(((8192, 0),), 0, 0)
    assert pieces_s(GPU, tokens, 8192) < 1.07 * whole_s
    assert pieces_s(GPU, 256, 8192) > 1.1 * whole_s


def test_a_cpu_packs_the_weights_for_every_piece_so_it_cuts_nothing() -> None:
    """Measured on a real server: five pieces of 256 took 1.45 times as long as 1,280 at once."""
    whole_s = CPU.iteration_s(((1280, 0),), 0, 0)
    assert 1.2 < pieces_s(CPU, 256, 1280) / whole_s < 1.6
    assert limit_s(CPU, 1280, 0, 0.05) == pytest.approx(whole_s)


@pytest.mark.parametrize("costs", [GPU, CPU], ids=["GPU", "CPU"])
@pytest.mark.parametrize("cached", [0, 3_000, 30_000])
@pytest.mark.parametrize("chunk_tokens", [64, 512, 2048, 8192])
def test_what_is_cut_takes_hardly_longer(costs: CostModel, cached: int, chunk_tokens: int) -> None:
    long_s = limit_s(costs, chunk_tokens, cached, 1e-9)
    whole = max(chunk_tokens, 256)
    n = next(
        n
        for n in (256 * 2**i for i in range(9))
        if n >= whole
        or costs.iteration_s(((n, cached + (whole - n) // 2),), 0, 0) >= long_s * (1 - 1e-9)
    )
    pieces = sum(
        costs.iteration_s(((min(n, whole - done), cached + done),), 0, 0)
        for done in range(0, whole, n)
    )
    whole_s = costs.iteration_s(((whole, cached),), 0, 0)
    assert pieces <= (1.0 + CUTTING_SHARE + 1e-6) * whole_s


def test_what_is_worth_a_pass_on_this_device() -> None:
    """Measured on a real server, eight at a time: with pieces of 256, 0.77 of the throughput."""

    def least_tokens(costs: CostModel) -> int:
        nobody = Decodes(Packing(costs, is_cascade=False), 0.0, math.inf)
        return room_beside(state(costs, 2048), nobody, SlackConfig()).least_tokens

    assert least_tokens(GPU) == 256
    tokens = least_tokens(CPU)
    assert 512 <= tokens <= 1024
    assert pieces_s(CPU, tokens, 2048) <= 1.16 * CPU.iteration_s(((2048, 0),), 0, 0)


def test_without_objectives_nothing_limits() -> None:
    assert limit_s(CPU, 2048, 0, math.inf, 0.1) == 1e9


# -- whose turn it is -----------------------------------------------------------------------------


def room(
    of: SchedulerState, left_s: float, *, mean: MeanPace | None = None, decode_s: float = 0.1
) -> PrefillRoom:
    """Before a decode of one whose token is due `left_s` after that."""
    batch = Packing.of_all(CPU, 1, 100)
    decodes = Decodes(batch, decode_s, decode_s + left_s, None if mean is None else lambda: mean)
    return room_before(of, PromptsAhead(of), decodes, SlackConfig())[0]


def cpu_s(*tokens: int) -> float:
    return CPU.iteration_s(tuple((n, 0) for n in tokens), 0, 0)


def test_a_prefill_takes_what_is_left_whoever_ran_last() -> None:
    three = state(CPU, 2048, 700, 700, 600)
    assert room(three, 1.01 * cpu_s(700, 700)) == PrefillRoom(1400, 2)
    assert room(three, 10.0) == NO_LIMIT
    assert room(three, 0.5 * cpu_s(256)) == PrefillRoom(0), "decoding has its turn"


def test_after_a_decode_it_has_its_turn_with_as_much_as_the_queue_needs() -> None:
    for ttft_s, share in ((100.0, PATIENT_SHARE), (6.0, WORTH_SHARE)):
        three = state(CPU, 2048, 700, 700, 600, ttft_s=ttft_s)
        three.turns.passed(0.0, 0.1, decoded=True)
        worth = PromptsAhead(three).worth_a_pass(share, 256 if share < 1 else 0)
        assert room(three, 0.0) == PrefillRoom(worth.tokens, worth.n_admitted)


def test_it_waits_for_decodes_that_gain_room_and_for_no_more_than_a_few() -> None:
    three = state(CPU, 2048, 700, 700, 600)
    worth_s = PromptsAhead(three).worth_a_pass(WORTH_SHARE, 256).seconds
    gains = MeanPace(0.1, 1.01 * worth_s / DECODES_AHEAD)
    for _ in range(DECODES_AHEAD):
        assert room(three, 0.0, mean=gains) == PrefillRoom(0)
        three.turns.passed(0.0, 0.1, decoded=True)
    assert room(three, 0.0, mean=gains).tokens
    three.turns.passed(0.0, 0.1, decoded=False)
    three.turns.passed(0.0, 0.1, decoded=True)
    assert room(three, 0.0, mean=gains) == PrefillRoom(0)
    hardly = MeanPace(0.1, 0.99 * worth_s / DECODES_AHEAD)
    assert room(three, 0.0, mean=hardly).tokens, "they gain it too little"
    assert room(three, 0.0, mean=MeanPace(0.11 + worth_s, 1.0)).tokens, "it is there already"


def test_what_fits_whole_need_not_wait_for_more_room() -> None:
    gains = MeanPace(0.1, 10.0)
    seconds = 1.01 * cpu_s(320)
    assert room(state(CPU, 2048, 300, 1700), seconds, mean=gains) == PrefillRoom(300, 1)
    assert room(state(CPU, 2048, 900, 1100), seconds, mean=gains) == PrefillRoom(0)


def test_where_nobody_runs_nobody_is_waited_for() -> None:
    long = state(CPU, 2048, 5000, ttft_s=1e-3)
    nobody = Decodes(Packing(CPU, is_cascade=False), 0.0, math.inf)
    granted, _ = room_before(long, PromptsAhead(long), nobody, SlackConfig())
    assert granted != PrefillRoom(0)


@pytest.mark.parametrize("left_s", [-1.0, 0.0, 0.05, 1.0, 60.0, math.inf])
@pytest.mark.parametrize("ttft_s", [1e-3, 1.0, 100.0, None])
@pytest.mark.parametrize("has_decoded", [True, False])
def test_no_pass_is_longer_than_sglangs_chunk(
    left_s: float, ttft_s: float | None, has_decoded: bool
) -> None:
    """Health checks are answered between passes, so they find the server no busier than without."""
    long = state(CPU, 2048, 7_500, 300, 7_500, ttft_s=ttft_s)
    long.turns.passed(0.0, 0.1, decoded=has_decoded)
    granted = room(long, left_s)
    assert granted == NO_LIMIT or (granted.tokens or 0) <= 2048


# -- everyone -------------------------------------------------------------------------------------


def everyone(saved_tokens: int) -> PrefillRoom:
    """Beside eight who share nearly all of their contexts, a decode of whom has just ended."""
    queue = Queue(FirstComeFirstServed())
    queue.running = [
        queue.arrive(at, [at], tokens=30_000, slo=Slo(ttft_s=1.0, tbt_s=0.012)) for at in range(8)
    ]
    for request in queue.running:
        queue.admit(request.request_id)
        request.first_token_s, request.output_tokens = 0.99, 1
    prompt = queue.arrive(100, range(1000, 1200))
    queue.now_s = 1.0
    queue.turns.passed(1.0, 0.01, decoded=True)
    rules = SlackConfig(mix_decodes=False)
    asked = EveryoneDecodes(replace(queue.state(), shared_tokens_saved=saved_tokens), rules)
    ahead = asked.ahead([prompt], goes_on=False)
    return asked.room([prompt], ahead, math.inf, goes_on=False)[0]


def test_what_a_gang_shares_is_read_once_in_the_decode_that_room_is_left_for() -> None:
    assert everyone(saved_tokens=0).tokens, "they take too long to gain any room"
    assert everyone(saved_tokens=7 * 29_000) == PrefillRoom(0)
