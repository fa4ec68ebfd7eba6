"""Pieces of what waits, priced by the requests in them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from support_simulation.builders import BLOCK_TOKENS, Queue
from tiered_kv.core.device_spec import find_device
from tiered_kv.core.model_spec import find_model
from tiered_kv.scheduler.cost_model import CostModel
from tiered_kv.scheduler.policies.fcfs import FirstComeFirstServed
from tiered_kv.scheduler.prompts_ahead import QUEUE_LOOK, STEP_TOKENS, PromptsAhead
from tiered_kv.scheduler.request_policy import Arriving, SchedulerState

CPU = CostModel(find_model("SmolLM2-135M"), find_device("CPU-2"), {})
SHARED = range(100)
CACHED = len(SHARED) * BLOCK_TOKENS


def state_of(*own_tokens: int, chunk_tokens: int = 512) -> SchedulerState:
    """Requests that add so many tokens each to a prefix on the device."""
    queue = Queue(FirstComeFirstServed())
    queue.cache(SHARED)
    for at, tokens in enumerate(own_tokens):
        blocks = [*SHARED, *range(1000 * at + 500, 1000 * at + 500 + tokens // BLOCK_TOKENS + 1)]
        queue.arrive(at, blocks, tokens=CACHED + tokens)
    return replace(queue.state(), costs=CPU, chunk_tokens=chunk_tokens)


def test_each_prompt_in_a_piece_reads_what_is_cached_before_it() -> None:
    many = PromptsAhead(state_of(*[16] * 8)).whole
    one = PromptsAhead(state_of(8 * 16)).whole
    assert many.chunks == ((16, CACHED),) * 8
    assert (many.tokens, many.n_admitted) == (one.tokens, 8)
    assert many.seconds > 1.3 * one.seconds


def test_the_largest_piece_within_some_time() -> None:
    ahead = PromptsAhead(state_of(*[16] * 8))
    seconds = [CPU.iteration_s(((16, CACHED),) * n, 0, 0) for n in range(1, 9)]
    assert ahead.within(0.99 * seconds[0]) is None
    for n, long_s in enumerate(seconds, 1):
        piece = ahead.within(long_s)
        assert piece is not None
        assert piece.n_admitted == n
        assert piece.seconds == pytest.approx(long_s)


def test_a_long_prompt_is_cut_and_short_ones_come_whole() -> None:
    ahead = PromptsAhead(state_of(100, 20, 1000))
    assert ahead.whole.chunks == ((100, CACHED), (20, CACHED), (392, CACHED))
    sizes = set()
    for share in range(1, 100):
        piece = ahead.within(ahead.whole.seconds * share / 100)
        sizes.add(0 if piece is None else piece.tokens)
    later = {120 + STEP_TOKENS * i for i in range(1, 7)}
    assert sizes == {0, 64, 100, 120} | later


def test_the_prompt_that_was_begun_comes_first_and_those_held_not_at_all() -> None:
    state = state_of(16, 16, 16)
    begun = state.waiting.get(0)
    state.waiting.remove(begun)
    begun.prefilled_tokens = CACHED + 6
    held = replace(state, unfinished=begun, held={1: Arriving(0.0, 0)})
    whole = PromptsAhead(held).whole
    assert whole.chunks == ((10, CACHED + 6), (16, CACHED))
    assert whole.n_admitted == 1
    assert not PromptsAhead(replace(state, held=dict.fromkeys((1, 2), Arriving(0.0, 0))))


def test_a_piece_is_worth_a_pass_if_all_of_it_takes_little_longer_in_such_pieces() -> None:
    ahead = PromptsAhead(state_of(*[16] * 16))
    for share in (0.15, 0.5, 1.0):
        piece = ahead.worth_a_pass(share)
        n = piece.n_admitted
        assert 16 / n * piece.seconds <= (1.0 + share) * ahead.whole.seconds
        if n > 1:
            half = CPU.iteration_s(((16, CACHED),) * (n // 2), 0, 0)
            assert 16 / (n // 2) * half > (1.0 + share) * ahead.whole.seconds
    assert ahead.worth_a_pass(0.0).tokens == ahead.whole.tokens


def test_only_the_first_of_a_long_queue_are_looked_at() -> None:
    ahead = PromptsAhead(state_of(*[1] * (QUEUE_LOOK + 10)))
    assert ahead.whole.n_admitted == QUEUE_LOOK
