"""Announced calls are expected until they come, or have not come for too long."""

from __future__ import annotations

import pytest

from tiered_kv.memory.demand import Expectation
from tiered_kv.scheduler.next_calls import CALLS_MAX, FORETOLD_MAX, GRACE_S, NextCalls


@pytest.fixture
def calls() -> NextCalls:
    return NextCalls()


def test_a_call_comes_nearer_and_is_overdue_for_as_long_again(calls: NextCalls) -> None:
    calls.announce(7, 100.0, 30.0, 0.75)
    assert calls.expected(100.0) == {7: Expectation(30.0, 0.75)}
    assert calls.expected(120.0) == {7: Expectation(10.0, 0.75)}
    assert calls.expected(130.0) == {7: Expectation(0.0, 0.75)}
    assert calls.expected(159.0) == {7: Expectation(29.0, 0.75)}, "the later, the less soon"
    assert calls.expected(161.0) == {}
    assert not calls


def test_one_that_was_to_come_at_once_has_some_time_left(calls: NextCalls) -> None:
    calls.announce(7, 100.0, 0.0, 1.0)
    assert calls.expected(100.0 + GRACE_S) == {7: Expectation(GRACE_S)}
    assert calls.expected(100.1 + GRACE_S) == {}


def test_who_came_is_expected_no_more(calls: NextCalls) -> None:
    for node_id in (1, 2, 3):
        calls.announce(node_id, 0.0, 5.0, 1.0)
    calls.came([9, 3, 1])
    assert list(calls.expected(0.0)) == [2]


def test_the_last_word_counts(calls: NextCalls) -> None:
    calls.announce(7, 0.0, 5.0, 1.0)
    calls.announce(7, 1.0, 60.0, 0.5)
    assert calls.expected(1.0) == {7: Expectation(60.0, 0.5)}
    calls.announce(7, 2.0, 60.0, 0.0)
    assert not calls


def test_both_what_is_kept_and_what_is_foretold_is_bounded(calls: NextCalls) -> None:
    for node_id in range(1, CALLS_MAX + 11):
        calls.announce(node_id, 0.0, 10_000.0 - node_id, 1.0)
    assert len(calls) == CALLS_MAX
    calls.announce(1, 0.0, 20_000.0, 1.0)
    expected = calls.expected(0.0)
    soonest = range(CALLS_MAX + 10, CALLS_MAX + 10 - FORETOLD_MAX, -1)
    assert list(expected) == list(soonest)
