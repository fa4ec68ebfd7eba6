"""How long an iteration may be for the sake of those who may arrive.

Guarantee: short against their objectives where that costs nothing worth mentioning; a prompt is
never cut into pieces that take noticeably longer than the whole.
"""

from __future__ import annotations

import math
from typing import Any

import pytest

from tiered_kv.core.device_spec import find_device
from tiered_kv.core.model_spec import find_model
from tiered_kv.scheduler.cost_model import CostModel
from tiered_kv.scheduler.pass_budget import (
    CUTTING_SHARE,
    DecodeWatch,
    PassBudget,
    arrivals_limit_s,
    chunk_tokens,
    pass_budget,
)
from tiered_kv.scheduler.policies.slack_config import SlackConfig
from tiered_kv.scheduler.request_policy import SchedulerState

GPU = CostModel(find_model("Llama-3.1-8B"), find_device("H200-141"), {})
CPU = CostModel(find_model("SmolLM2-135M"), find_device("CPU-2"), {})


def state(costs: CostModel, chunk_tokens: int) -> Any:
    return _State(costs, chunk_tokens)


class _State:
    """What is read of a `SchedulerState`."""

    def __init__(self, costs: CostModel, chunk_tokens: int) -> None:
        assert {"costs", "chunk_tokens"} <= set(SchedulerState.__dataclass_fields__)
        self.costs, self.chunk_tokens = costs, chunk_tokens


def pieces_s(costs: CostModel, tokens: int, whole: int) -> float:
    return sum(costs.iteration_s(((tokens, done),), 0, 0) for done in range(0, whole, tokens))


def test_a_gpu_cuts_as_short_as_the_objectives_want() -> None:
    assert arrivals_limit_s(state(GPU, 8192), 0, 0.05, 0.0) == 0.05
    # Two decodes of all who run come in between anyway.
    assert arrivals_limit_s(state(GPU, 8192), 0, 0.05, 0.04) == 0.08


def test_but_not_into_pieces_that_the_weights_are_read_for() -> None:
    limit_s = arrivals_limit_s(state(GPU, 8192), 0, 0.001, 0.0)
    tokens = next(n for n in (256, 512, 1024, 2048) if GPU.iteration_s(((n, 0),), 0, 0) >= 0.02)
    assert 0.01 < limit_s < 0.05
    whole_s = GPU.iteration_s(((8192, 0),), 0, 0)
    assert pieces_s(GPU, tokens, 8192) < 1.07 * whole_s
    assert pieces_s(GPU, 256, 8192) > 1.1 * whole_s


def test_a_cpu_packs_the_weights_for_every_piece_so_it_cuts_nothing() -> None:
    """Measured on a real server: five pieces of 256 took 1.45 times as long as 1,280 at once."""
    whole_s = CPU.iteration_s(((1280, 0),), 0, 0)
    assert 1.2 < pieces_s(CPU, 256, 1280) / whole_s < 1.6
    assert arrivals_limit_s(state(CPU, 1280), 0, 0.05, 0.0) == pytest.approx(whole_s)


@pytest.mark.parametrize("costs", [GPU, CPU], ids=["GPU", "CPU"])
@pytest.mark.parametrize("cached", [0, 3_000, 30_000])
@pytest.mark.parametrize("chunk_tokens", [64, 512, 2048, 8192])
def test_what_is_cut_takes_hardly_longer(costs: CostModel, cached: int, chunk_tokens: int) -> None:
    limit_s = arrivals_limit_s(state(costs, chunk_tokens), cached, 1e-9, 0.0)
    whole = max(chunk_tokens, 256)
    n = next(
        n
        for n in (256 * 2**i for i in range(9))
        if n >= whole
        or costs.iteration_s(((n, cached + (whole - n) // 2),), 0, 0) >= limit_s * (1 - 1e-9)
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
        alone: Any = state(costs, 2048)
        alone.running, alone.unfinished, alone.now_s, alone.decode_context_tokens = [], None, 0.0, 0
        alone.least_ttft_s = math.inf
        return pass_budget(alone, SlackConfig(), DecodeWatch()).least_tokens

    assert least_tokens(GPU) == 256
    tokens = least_tokens(CPU)
    assert 512 <= tokens <= 1024
    assert pieces_s(CPU, tokens, 2048) <= 1.16 * CPU.iteration_s(((2048, 0),), 0, 0)


def test_what_fits_whole_need_not_wait_for_more_room() -> None:
    seconds = CPU.iteration_s(((320, 0),), 0, 0)
    budget = PassBudget(seconds, 1.0, 0, 0, 0, mix_decodes=False, saves_up=True)

    def tokens(first_tokens: int) -> int:
        return chunk_tokens(state(CPU, 2048), budget, 0, first_tokens, math.inf)

    assert tokens(300) >= 300
    assert tokens(900) == 0
    assert tokens(0) == 0, "whoever is first needs something"


def test_without_objectives_nothing_limits() -> None:
    assert math.isinf(arrivals_limit_s(state(CPU, 2048), 0, math.inf, 0.1))


@pytest.mark.parametrize("costs", [GPU, CPU], ids=["GPU", "CPU"])
@pytest.mark.parametrize("seconds", [1e-6, 0.05, 1.0, 60.0, math.inf])
@pytest.mark.parametrize("cached", [0, 6_000, 30_000])
@pytest.mark.parametrize("first_tokens", [0, 300, 7_500])
def test_no_pass_is_longer_than_sglangs_chunk(
    costs: CostModel, seconds: float, cached: int, first_tokens: int
) -> None:
    """Health checks are answered between passes, so they find the server no busier than without."""
    budget = PassBudget(seconds, 1.0, 900, 3, 128, mix_decodes=True, saves_up=False)
    for due_s in (0.0, 10.0, math.inf):
        tokens = chunk_tokens(state(costs, 2048), budget, cached, first_tokens, due_s)
        assert tokens <= 2048 + 3
