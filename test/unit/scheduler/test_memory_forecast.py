"""Predicted peaks, against stepping through them; and lengths learned from past answers."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from support_simulation.builders import Queue
from tiered_kv.api.slo import Slo
from tiered_kv.core.ids import Tier
from tiered_kv.scheduler.memory_forecast import (
    MemoryForecast,
    OutputLengths,
    admissible,
    peak_tokens,
)
from tiered_kv.scheduler.request import QueuedRequest
from tiered_kv.scheduler.request_policy import request_policies

FUTURES = st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20)), max_size=8)


def stepped_peak(futures: list[tuple[int, int]]) -> int:
    """Everyone grows by one a step, and leaves after the step in which it has its last token."""
    peak, step = 0, 0
    while any(left > step for _, left in futures):
        step += 1
        peak = max(peak, sum(now + step for now, left in futures if left >= step))
    return peak


@settings(max_examples=300, deadline=None)
@given(FUTURES)
def test_the_peak_is_that_of_stepping_through(futures: list[tuple[int, int]]) -> None:
    assert peak_tokens(futures) == stepped_peak(futures)


@settings(max_examples=200, deadline=None)
@given(FUTURES, FUTURES, st.integers(0, 400))
def test_as_many_are_admissible_as_fit(
    running: list[tuple[int, int]], candidates: list[tuple[int, int]], capacity: int
) -> None:
    n = admissible(running, candidates, capacity)
    if n:
        assert peak_tokens([*running, *candidates[:n]]) <= capacity
    if n < len(candidates):
        assert peak_tokens([*running, *candidates[: n + 1]]) > capacity


def finished(n_tokens: int, slo_class: str = "standard") -> QueuedRequest:
    request = waiting(slo_class)
    request.output_tokens = n_tokens
    return request


def waiting(slo_class: str = "standard") -> QueuedRequest:
    q = Queue(request_policies.get("fcfs")())
    return q.arrive(0, [1, 2, 3], slo=Slo(slo_class))


class TestOutputLengths:
    def test_without_experience_the_limit_counts_and_a_hint_more(self) -> None:
        lengths, request = OutputLengths(), waiting()
        assert lengths.total(request, 0.5) == request.max_new_tokens == 100
        request.expected_output_tokens = 30
        assert lengths.total(request, 0.5) == 30
        request.output_tokens = 30
        assert lengths.total(request, 0.5) == 100

    def test_only_answers_longer_than_it_is_already_say_something(self) -> None:
        lengths = OutputLengths(least=4)
        for n in (10, 20, 30, 90):
            lengths.observe(finished(n))
        request = waiting()
        assert lengths.total(request, 0.5) == 30
        request.output_tokens = 30
        assert lengths.total(request, 0.5) == 90
        request.output_tokens = 95
        assert lengths.total(request, 0.5) == 100

    def test_classes_are_apart_once_they_are_known(self) -> None:
        lengths = OutputLengths(least=3)
        for _ in range(3):
            lengths.observe(finished(80, "batch"))
        assert lengths.total(waiting("interactive"), 0.5) == 80
        for _ in range(3):
            lengths.observe(finished(5, "interactive"))
        assert lengths.total(waiting("interactive"), 0.5) == 5
        assert lengths.total(waiting("batch"), 0.5) == 80

    def test_old_answers_are_forgotten(self) -> None:
        lengths = OutputLengths(window=5, least=3)
        for n in (90, 90, 90, 10, 10, 10, 10, 10):
            lengths.observe(finished(n))
        assert lengths.total(waiting(), 0.99) == 10


class TestMemoryForecast:
    def forecast(self) -> MemoryForecast:
        forecast = MemoryForecast(0.5, 0.0)
        for _ in range(30):
            forecast.finished(finished(40))
        return forecast

    def queue(self) -> Queue:
        q = Queue(request_policies.get("fcfs")())
        for request_id in range(6):
            q.arrive(request_id, [request_id + 1])  # 65 tokens
        return q

    def test_it_admits_what_fits_to_its_end(self) -> None:
        q, state = self.queue(), self.queue().state()
        state.available_tokens = 3 * (65 + 40)
        assert self.forecast().admit_at_most(state, list(q.waiting)) == 3
        state.available_tokens -= 1
        assert self.forecast().admit_at_most(state, list(q.waiting)) == 2

    def test_who_runs_counts_with_what_is_to_come(self) -> None:
        q = self.queue()
        running = q.waiting.get(5)
        q.admit(5)
        running.output_tokens = 10
        q.running = [running]
        state = q.state()
        # It will give 65 + 40 back before the others, admitted now, reach their ends.
        state.available_tokens = 30 + 65 + 30
        assert self.forecast().admit_at_most(state, list(q.waiting)) == 1
        state.available_tokens = 30 + 65 + 29
        assert self.forecast().admit_at_most(state, list(q.waiting)) == 0

    def test_a_prefix_that_several_share_counts_once(self) -> None:
        q = Queue(request_policies.get("fcfs")())
        q.cache(range(1, 9))
        for request_id in range(4):
            q.arrive(request_id, [*range(1, 9), 100 + request_id])  # 8 * 64 cached, 65 besides
        state, own = q.state(), 65 + 40
        # Evictable as it is, the prefix is part of what is available, and held from then on.
        state.available_tokens = 8 * 64 + 3 * own
        assert self.forecast().admit_at_most(state, list(q.waiting)) == 3
        state.available_tokens -= 1
        assert self.forecast().admit_at_most(state, list(q.waiting)) == 2

    def test_what_others_hold_of_a_prefix_needs_no_room(self) -> None:
        q = Queue(request_policies.get("fcfs")())
        q.cache(range(1, 9))
        for request_id in range(4):
            q.arrive(request_id, [*range(1, 9), 100 + request_id])
        running = q.waiting.get(3)
        q.forest.pin(running.path[-1], Tier.DEVICE)
        q.admit(3)
        q.running = [running]
        state, own = q.state(), 65 + 40
        state.available_tokens = 40 + 2 * own
        assert self.forecast().admit_at_most(state, list(q.waiting)) == 2
        state.available_tokens -= 1
        assert self.forecast().admit_at_most(state, list(q.waiting)) == 1

    def test_alone_somebody_is_admitted_and_unknown_memory_says_nothing(self) -> None:
        q = self.queue()
        state = q.state()
        state.available_tokens = 10
        assert self.forecast().admit_at_most(state, list(q.waiting)) == 1
        state.available_tokens = None
        assert self.forecast().admit_at_most(state, list(q.waiting)) is None
