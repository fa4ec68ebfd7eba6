"""The tightest first-token objective of the last minutes."""

from __future__ import annotations

import math
import random

from tiered_kv.scheduler.tightest import MEMORY_S, TightestObjective


def test_it_is_the_least_of_those_who_came_of_late() -> None:
    chance = random.Random(3)
    tightest, came = TightestObjective(), list[tuple[float, float]]()
    now_s = 0.0
    for _ in range(2000):
        now_s += chance.expovariate(1 / 20.0)
        if chance.random() < 0.5:
            came.append((now_s, chance.choice((0.1, 0.5, 2.0, 30.0)) * chance.random()))
            tightest.arrived(came[-1][1], now_s)
        recent = [ttft_s for at_s, ttft_s in came if at_s >= now_s - MEMORY_S]
        assert tightest.seconds(now_s) == min(recent, default=math.inf)


def test_one_absurd_objective_is_forgotten() -> None:
    tightest = TightestObjective()
    tightest.arrived(0.5, 0.0)
    tightest.arrived(0.001, 10.0)
    tightest.arrived(None, 11.0)
    tightest.arrived(0.5, MEMORY_S)
    assert tightest.seconds(MEMORY_S) == 0.001
    assert tightest.seconds(MEMORY_S + 11.0) == 0.5
    assert tightest.seconds(3 * MEMORY_S) == math.inf
