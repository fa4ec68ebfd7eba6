"""Which server gets a request."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from support_simulation.builders import call
from tiered_kv.core.errors import ConfigError
from tiered_kv.simulation.routers import BALANCE_ABS, ROUTINGS, make_router, one_for_another


def servers(*open_requests: int) -> Any:
    return [SimpleNamespace(n_open=n) for n in open_requests]


def test_a_conversation_stays_where_it_began() -> None:
    route = make_router("session")
    assert route(call(0, 0.0, [1], session=7), servers(3, 1, 2)) == 1
    assert route(call(1, 1.0, [1, 2], session=7), servers(0, 99, 0)) == 1
    assert route(call(2, 1.0, [1, 2], session=8), servers(0, 99, 0)) == 0
    assert route(call(3, 1.0, [1, 2]), servers(5, 4, 3)) == 2  # stands alone


def test_a_prompt_goes_to_the_server_that_has_had_the_longest_part() -> None:
    route = make_router("cache-aware")
    assert route(call(0, 0.0, range(10)), servers(1, 0)) == 1
    assert route(call(1, 0.0, range(100, 110)), servers(0, 1)) == 0
    assert route(call(2, 1.0, [*range(10), 10, 11]), servers(0, 9)) == 1
    # Two of ten blocks are too few to go where it is busier.
    assert route(call(3, 1.0, [0, 1, *range(200, 208)]), servers(0, 9)) == 0
    # The last to be sent a block is taken to have it.
    assert route(call(4, 1.0, [0, 1]), servers(9, 0)) == 0


def test_a_swamped_server_gets_no_more_for_its_cache() -> None:
    route = make_router("cache-aware")
    route(call(0, 0.0, range(10)), servers(0, 1))
    assert route(call(1, 1.0, range(10)), servers(BALANCE_ABS, 0)) == 0
    assert route(call(2, 1.0, range(10)), servers(BALANCE_ABS + 1, 0)) == 1


def test_random_routing_reaches_all_evenly_and_the_same_each_time() -> None:
    def sent(seed: int) -> Sequence[int]:
        route, four = make_router("random", seed), servers(0, 0, 0, 0)
        return [route(call(n, 0.0, [n]), four) for n in range(2000)]

    first = sent(1)
    assert sent(1) == first
    assert sent(2) != first
    assert all(400 < first.count(server) < 600 for server in range(4))


@pytest.mark.parametrize("name", ROUTINGS)
def test_who_has_gone_gets_nothing_more(name: str) -> None:
    """Of three servers two are there; each ten seconds another takes the place of the oldest."""
    route = make_router(name, present=one_for_another(10.0, 2))
    sent = [route(call(n, n / 10, [n % 7], session=n % 7), servers(0, 0, 0)) for n in range(300)]
    assert set(sent[:100]) == ({0, 1} if name == "random" else {0})
    assert 0 not in sent[100:]
    assert set(sent[100:]) == ({1, 2} if name == "random" else {1})


def test_a_conversation_whose_server_has_gone_stays_with_the_next() -> None:
    route = make_router("session", present=one_for_another(10.0, 2))
    assert route(call(0, 9.0, [1], session=7), servers(0, 1, 1)) == 0
    assert route(call(1, 10.0, [1, 2], session=7), servers(0, 2, 1)) == 2
    assert route(call(2, 11.0, [1, 2, 3], session=7), servers(0, 1, 9)) == 2


def test_an_unknown_routing_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="cache-aware, session, random"):
        make_router("best")
