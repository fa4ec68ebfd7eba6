"""The forest against a naive model, over random histories of every operation it has.

The model is a dict from page to its state, slots and transfer per tier, where a page is named by
its namespace and all pages up to it. It knows no nodes, so it can't share the forest's mistakes
about splitting. After every step the forest must

* pass its own check_integrity, hashes included;
* hold, page by page, exactly what the model holds: states, slots, transfers and pins;
* agree on totals, on what may be evicted, and on which operations are refused;
* have every slot it was given either in a page or handed back, exactly once.

TIERED_KV_PROPERTY_EXAMPLES raises the number of histories per page size (default 100).
"""

from __future__ import annotations

import os
from array import array
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule

from support_forest.model import ABSENT, RESIDENT, TIERS, Model
from support_forest.strategies import (
    CAP,
    CHOICE,
    GROWN,
    IN_TRANSFER,
    ROOTS,
    SLOT_KIND,
    SYMBOLS,
    TIER,
)
from support_forest.transfers import TransferRules
from tiered_kv.core.errors import IntegrityError
from tiered_kv.core.ids import Tier
from tiered_kv.forest.node import Node
from tiered_kv.forest.residency import Residency

SETTINGS = settings(
    max_examples=int(os.environ.get("TIERED_KV_PROPERTY_EXAMPLES", "100")),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


class ForestMachine(TransferRules):
    """And what makes and changes the tree: matches, insertions, splits, clearing."""

    @rule(root=ROOTS, symbols=SYMBOLS, tail=CHOICE, cap=CAP)
    def match(self, root: int, symbols: tuple[int, ...], tail: int, cap: int | None) -> None:
        self.match_prompt(root, symbols, tail, cap)

    @rule(choice=CHOICE, more=SYMBOLS, tail=CHOICE, cap=CAP)
    def match_known(self, choice: int, more: tuple[int, ...], tail: int, cap: int | None) -> None:
        node = self.a_node(choice)
        if node is not None:
            root, symbols = self.page_of(node)
            self.match_prompt(root, symbols + more, tail, cap)

    def match_prompt(self, root: int, symbols: tuple[int, ...], tail: int, cap: int | None) -> None:
        tokens = self.tokens(symbols, tail)
        n_considered = len(symbols) if cap is None else min(len(symbols), max(cap, 0))
        limit = None if cap is None else cap * self.page_size + tail % self.page_size
        n_known = self.model.known(root, symbols[:n_considered])
        n_tokens = self.forest.peek(self.roots[root], tokens, limit).end
        assert n_tokens == n_known * self.page_size
        found = self.forest.match(self.roots[root], tokens, limit)
        assert found.n_tokens == n_tokens
        assert sum(node.n_tokens for node in found.path) == n_tokens
        assert self.page_of(found.last) == (root, symbols[:n_known])
        for above, below in zip((found.root, *found.path), found.path, strict=False):
            assert below.parent is above
            assert below.last_access == found.last.last_access

    @rule(
        root=ROOTS,
        symbols=SYMBOLS,
        tail=CHOICE,
        tier=st.sampled_from([Tier.DEVICE, Tier.DEVICE, Tier.HOST]),
        kind=SLOT_KIND,
    )
    def insert(self, root: int, symbols: tuple[int, ...], tail: int, tier: Tier, kind: str) -> None:
        self.insert_whole(root, symbols, tail, tier, kind)

    def insert_whole(
        self, root: int, symbols: tuple[int, ...], tail: int, tier: Tier, kind: str
    ) -> None:
        path = self.model.path(root, symbols)
        slots = self.new_slots(len(path), tier, kind)
        tokens = self.tokens(symbols, tail)
        present = [
            page in self.model.pages and self.model.pages[page][tier].state is not ABSENT
            for page in path
        ]
        n_resident = present.index(False) if False in present else len(present)
        if any(present[n_resident:]):
            with pytest.raises(IntegrityError):
                self.forest.insert(self.roots[root], tokens, slots, tier=tier)
            self.take_back(slots, slots)
            return
        result = self.forest.insert(self.roots[root], tokens, slots, tier=tier)
        tokens[:] = array("q", [-1] * len(tokens))  # the caller's array goes on living
        assert result.resident_tokens == n_resident * self.page_size
        unit = self.page_size if tier is Tier.DEVICE else 1
        own = slots[: n_resident * unit]
        self.take_back(own, own)
        for index, page in enumerate(path[n_resident:], start=n_resident):
            self.settle(page, tier, RESIDENT, self.cut(slots, len(path), index))
        assert self.page_of(result.last) == (root, symbols)
        adopted = [page for node in result.adopted for page in self.pages_of(node)]
        assert adopted == path[n_resident:]

    @rule(
        choice=CHOICE,
        below_root=ROOTS,
        symbols=SYMBOLS,
        tier=TIER,
        state=IN_TRANSFER,
        kind=SLOT_KIND,
    )
    def extend(
        self,
        choice: int,
        below_root: int,
        symbols: tuple[int, ...],
        tier: Tier,
        state: Residency,
        kind: str,
    ) -> None:
        node = self.a_node(choice)
        anchor = self.roots[below_root] if node is None or choice % 3 == 0 else node
        self.extend_below(anchor, symbols, tier, state, kind)

    @rule(root=ROOTS, symbols=GROWN, tier=TIER, pin=st.booleans(), more=SYMBOLS)
    def fetch_rest(
        self, root: int, symbols: tuple[int, ...], tier: Tier, pin: bool, more: tuple[int, ...]
    ) -> None:
        """What a request does: match, start loading the rest, hold it, perhaps build on it."""
        found = self.forest.match(self.roots[root], self.tokens(symbols))
        rest = symbols[found.n_tokens // self.page_size :]
        self.extend_below(found.last, rest, tier, Residency.LOADING, "list")
        if pin:
            last = self.forest.match(self.roots[root], self.tokens(symbols)).last
            self.pin_node(last, tier)
        if more:
            self.insert_whole(root, symbols + more, 0, Tier.DEVICE, "list")

    def extend_below(
        self, anchor: Node, symbols: tuple[int, ...], tier: Tier, state: Residency, kind: str
    ) -> None:
        root, above = self.page_of(anchor)
        run = self.model.path(root, above + symbols)[len(above) :]
        slots = self.new_slots(len(run), tier, kind)
        tokens = self.tokens(symbols)
        self.n_ops += 1
        legal = (
            bool(run)
            and self.model.may_come(run[0], tier)
            and all(
                page not in self.model.pages or self.model.pages[page][tier].state is ABSENT
                for page in run
            )
        )
        if not legal:
            with pytest.raises(IntegrityError):
                self.forest.extend(anchor, tokens, tier, state, slots, self.n_ops)
            self.take_back(slots, [] if slots is None else slots)
            return
        nodes = self.forest.extend(anchor, tokens, tier, state, slots, self.n_ops)
        assert [page for node in nodes for page in self.pages_of(node)] == run
        for index, page in enumerate(run):
            self.settle(page, tier, state, self.cut(slots, len(run), index), self.n_ops)

    @rule(choice=CHOICE, at=CHOICE)
    def split(self, choice: int, at: int) -> None:
        node = self.a_node(choice)
        if node is None:
            return
        n_pages = at % (node.n_pages + 1)
        if n_pages in (0, node.n_pages):
            with pytest.raises(IntegrityError):
                self.forest.split(node, n_pages)
            return
        last_page = self.page_of(node)
        upper, lower = self.forest.split(node, n_pages)
        assert lower is node
        assert self.page_of(lower) == last_page
        assert upper.n_pages == n_pages
        assert (upper.last_access, upper.hits) == (lower.last_access, lower.hits)

    @rule(chance=CHOICE)
    def clear(self, chance: int) -> None:
        if chance % 16 != 7:  # rarely: it ends a history
            return
        dropped = [
            slot for tiers in self.model.pages.values() for t in TIERS for slot in tiers[t].slots
        ]
        self.take_back(dropped, dropped)
        self.forest.clear()
        self.held_before_clear += [(node, tier) for node, _, tier in self.held]
        self.held.clear()
        self.model = Model()

    @initialize(
        prompts=st.lists(st.tuples(ROOTS, GROWN), min_size=2, max_size=6),
        fetches=st.lists(st.tuples(ROOTS, GROWN, TIER, st.booleans(), SYMBOLS), max_size=3),
    )
    def start_grown(
        self,
        prompts: list[tuple[int, tuple[int, ...]]],
        fetches: list[tuple[int, tuple[int, ...], Tier, bool, tuple[int, ...]]],
    ) -> None:
        """Most mistakes need a few nodes below each other, and transfers under way."""
        for root, symbols in prompts:
            self.insert_whole(root, symbols, 0, Tier.DEVICE, "list")
        for fetch in fetches:
            self.fetch_rest(*fetch)


def machine_for(page_size: int) -> Any:
    machine = type(f"ForestMachine{page_size}", (ForestMachine,), {"page_size": page_size})
    machine.TestCase.settings = SETTINGS
    return machine.TestCase


TestPageSize1 = machine_for(1)
TestPageSize4 = machine_for(4)
TestPageSize16 = machine_for(16)
