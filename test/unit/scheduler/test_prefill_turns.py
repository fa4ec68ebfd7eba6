"""What share of the time prefill takes, and what it is granted while prompts wait."""

from __future__ import annotations

import math

import pytest

from tiered_kv.scheduler.prefill_turns import LOAD_MEMORY_S, TURN_SHARE, PrefillTurns


def test_the_share_follows_what_ran() -> None:
    turns = PrefillTurns()
    assert (turns.decoded_last, turns.load()) == (True, 0.0)
    turns.passed(3.0, LOAD_MEMORY_S, decoded=False)
    assert not turns.decoded_last
    assert turns.load() == pytest.approx(1.0 - math.exp(-1.0))
    turns.passed(9.0, 2 * LOAD_MEMORY_S, decoded=True)
    assert turns.decoded_last
    assert turns.load() == pytest.approx((1.0 - math.exp(-1.0)) * math.exp(-2.0))


def test_alternating_passes_come_to_their_share() -> None:
    turns = PrefillTurns()
    for _ in range(1000):
        turns.passed(0.0, 0.03, decoded=False)
        turns.passed(0.0, 0.01, decoded=True)
    assert turns.load() == pytest.approx(0.75, abs=0.01)


def test_prompts_that_wait_are_granted_turns_until_it_is_decided_who_decodes() -> None:
    turns = PrefillTurns()
    turns.wants_prefill()
    assert turns.load() == TURN_SHARE
    assert turns.load(is_mixed=True) == 0.0, "a mixed pass is everybody's turn"
    turns.decided()
    assert turns.load() == 0.0


def test_it_is_known_when_the_last_decode_ended_and_how_many_came_in_a_row() -> None:
    turns = PrefillTurns()
    turns.passed(1.0, 0.5, decoded=True)
    turns.passed(3.0, 2.0, decoded=True, n=4)
    assert (turns.decoded_s, turns.in_a_row) == (3.0, 5)
    turns.passed(4.0, 1.0, decoded=False)
    assert (turns.decoded_s, turns.in_a_row) == (3.0, 0)


def test_a_hurry_lasts_until_the_next_plan_or_until_nobody_waits() -> None:
    turns = PrefillTurns()
    turns.wants_prefill()
    turns.planned(is_hurried=True)
    turns.decided()
    assert turns.is_hurried, "while the batch is full no plan with prefill is made"
    turns.planned(is_hurried=False)
    assert not turns.is_hurried
    turns.planned(is_hurried=True)
    turns.nobody_waits()
    assert not turns.is_hurried
