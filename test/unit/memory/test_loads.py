"""Whether to load from the host now: prices that are doubted, and loads that fail."""

from __future__ import annotations

from array import array

from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.key import namespace_hash
from tiered_kv.forest.results import Match
from tiered_kv.memory.actions import Load
from tiered_kv.memory.back_off import FIRST_S
from tiered_kv.memory.loads import Loads
from tiered_kv.memory.probes import PROBE_EVERY_S, PROBE_PAGES

FOREST = Forest(1)
MATCH = FOREST.match(FOREST.root(namespace_hash("test")), array("q"))
LOAD = Load((1,), Tier.HOST, Tier.DEVICE)


class Rules:
    """A manager to whom nothing is worth loading; remembers what it was asked."""

    def __init__(self) -> None:
        self.least: list[int] = []

    def on_match(
        self,
        match: Match,
        *,
        prompt_tokens: int | None = None,
        queued_bytes: int = 0,
        least_pages: int = 0,
    ) -> Load | None:
        assert (match, prompt_tokens, queued_bytes) == (MATCH, 10, 5)
        self.least.append(least_pages)
        return LOAD if least_pages else None


def wanted(loads: Loads, rules: Rules, now_s: float) -> Load | None:
    return loads.wanted(rules, MATCH, now_s, prompt_tokens=10, queued_bytes=5)


def test_a_price_is_doubted_when_nothing_was_loaded_for_long() -> None:
    loads, rules = Loads(), Rules()
    assert wanted(loads, rules, 0.0) is None
    assert wanted(loads, rules, PROBE_EVERY_S) is LOAD
    loads.begun(PROBE_EVERY_S)
    assert wanted(loads, rules, PROBE_EVERY_S + 1.0) is None
    assert rules.least == [0, PROBE_PAGES, 0]
    coarse = Rules()
    wanted(Loads(pages_per_unit=8.0), coarse, PROBE_EVERY_S)
    assert coarse.least == [1]


def test_after_failures_none_is_tried_for_a_while() -> None:
    loads, rules = Loads(), Rules()
    now_s = PROBE_EVERY_S
    loads.failed(now_s)
    assert loads.is_waiting(now_s)
    assert not loads.are_working
    assert wanted(loads, rules, now_s + 0.9 * FIRST_S) is None
    assert not rules.least, "nobody is asked"
    assert wanted(loads, rules, now_s + FIRST_S) is LOAD
    loads.worked()
    assert loads.are_working
