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

import itertools
import os
from array import array
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule

from support_forest.compared import ComparedForest
from support_forest.model import ABSENT, RESIDENT, TIERS, Model, Page, is_prefix
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

# A prompt is a few of three pages that differ in their first or in their last token only, and a
# tail that fills no page. Few pages, so that prompts share prefixes.
SYMBOLS = st.lists(st.sampled_from([0, 0, 1, 2]), max_size=7).map(tuple)
GROWN = st.lists(st.sampled_from([0, 1, 2]), min_size=3, max_size=7).map(tuple)
ROOTS = st.integers(min_value=0, max_value=1)
CHOICE = st.integers(min_value=0, max_value=10**6)
CAP = st.none() | st.integers(-1, 8)
TIER = st.sampled_from(TIERS)
IN_TRANSFER = st.sampled_from([Residency.LOADING, Residency.WRITING_BACK])
SLOT_KIND = st.sampled_from(["list", "range", "numpy"])


class ForestMachine(ComparedForest):
    # -- prefixes -----------------------------------------------------------------------------

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

    # -- residency and transfers --------------------------------------------------------------

    @rule(choice=CHOICE, tier=TIER)
    def evict(self, choice: int, tier: Tier) -> None:
        """Any node: it must go, or be refused, as the model says."""
        node = self.a_node(choice)
        if node is None:
            return
        pages = self.pages_of(node)
        last = pages[-1]
        legal = (
            self.model.pages[last][tier].state is RESIDENT
            and not self.model.n_pins(last, tier)
            and (tier is Tier.DISK or not self.model.present_children(last, tier))
        )
        if not legal:
            with pytest.raises(IntegrityError):
                self.forest.evict(node, tier)
            return
        slots = self.forest.evict(node, tier)
        self.take_back(slots, [slot for page in pages for slot in self.vacate(page, tier)])

    @rule(tier=TIER, n_pages=st.integers(0, 6))
    def relieve_pressure(self, tier: Tier, n_pages: int) -> None:
        freeable = self.model.freeable(tier)
        n_freed = 0
        for drop in self.manager.on_pressure(tier, n_pages):
            node = self.forest.node(drop.node_id)
            pages = self.pages_of(node)
            slots = self.forest.evict(node, tier)
            self.take_back(slots, [slot for page in pages for slot in self.vacate(page, tier)])
            n_freed += len(pages)
            self.model.prune()
        assert n_freed == min(n_pages, freeable)

    @rule(choice=CHOICE, tier=TIER, kind=SLOT_KIND)
    def set_resident(self, choice: int, tier: Tier, kind: str) -> None:
        self.arrive(choice, tier, RESIDENT, kind, None)

    @rule(choice=CHOICE, tier=TIER, state=IN_TRANSFER, kind=SLOT_KIND, join=st.booleans())
    def start_transfer(
        self, choice: int, tier: Tier, state: Residency, kind: str, join: bool
    ) -> None:
        if not join:
            self.n_ops += 1
        self.arrive(choice, tier, state, kind, max(self.n_ops, 1))

    def arrive(self, choice: int, tier: Tier, state: Residency, kind: str, op: int | None) -> None:
        node = self.a_node(choice)
        if node is None:
            return
        pages = self.pages_of(node)
        slots = self.new_slots(len(pages), tier, kind)
        legal = self.model.pages[pages[0]][tier].state is ABSENT and self.model.may_come(
            pages[0], tier
        )

        def call() -> None:
            if op is None:
                self.forest.set_resident(node, tier, slots)
            else:
                self.forest.start_transfer(node, tier, state, slots, op)

        if not legal:
            with pytest.raises(IntegrityError):
                call()
            self.take_back(slots, [] if slots is None else slots)
            return
        call()
        for index, page in enumerate(pages):
            self.settle(page, tier, state, self.cut(slots, len(pages), index), op)

    @rule(choice=CHOICE)
    def finish_transfer(self, choice: int) -> None:
        chosen = self.an_op(choice)
        if chosen is None:
            assert self.forest.finish_transfer(self.n_ops + 1, Tier.HOST) == []
            return
        op, tier = chosen
        pages = self.model.of_op(op, tier)
        names = {node: self.pages_of(node) for node in self.forest.nodes_of(op)}
        nodes = self.forest.finish_transfer(op, tier)
        assert sorted(page for node in nodes for page in names[node]) == sorted(pages)
        for page in pages:
            self.settle(page, tier, RESIDENT, self.model.pages[page][tier].slots)

    @rule(choice=CHOICE)
    def abort_transfer(self, choice: int) -> None:
        chosen = self.an_op(choice)
        if chosen is None:
            return
        op, tier = chosen
        self.fail(
            op, tier, self.model.of_op(op, tier), lambda: self.forest.abort_transfer(op, tier)
        )

    @rule(choice=CHOICE)
    def abort_and_let_go(self, choice: int) -> None:
        """What happens to a request whose load failed."""
        chosen = self.an_op(choice)
        if chosen is None:
            return
        op, tier = chosen
        pages = self.model.of_op(op, tier)
        self.fail(op, tier, pages, lambda: self.forest.abort_transfer(op, tier))
        for hold in [hold for hold in self.held if hold[1] in pages]:
            self.let_go(self.held.index(hold))

    @rule(choice=CHOICE, n_pages=st.integers(0, 7))
    def finish_leading(self, choice: int, n_pages: int) -> None:
        chosen = self.an_op(choice)
        if chosen is None:
            return
        op, tier = chosen
        pages = self.model.of_op(op, tier)
        if not all(is_prefix(a, b) for a, b in itertools.pairwise(pages)):
            return  # not on one path: the method makes no promise
        came: list[Node] = []

        def call() -> Any:
            nodes, freed = self.forest.finish_leading(op, tier, n_pages)
            came.extend(nodes)
            return freed

        if self.fail(op, tier, pages[n_pages:], call):
            assert sum(node.n_pages for node in came) == len(pages[:n_pages])
            for page in pages[:n_pages]:
                self.settle(page, tier, RESIDENT, self.model.pages[page][tier].slots)

    def fail(self, op: int, tier: Tier, pages: list[Page], call: Any) -> bool:
        """`call` makes `pages` ABSENT, unless something on the device builds on them."""
        dependents = [
            child
            for page in pages
            for child in self.model.present_children(page, tier)
            if self.model.pages[child][tier].op != op
        ]
        if tier is Tier.DEVICE and dependents:
            with pytest.raises(IntegrityError):
                call()
            return False
        expected = {page: self.vacate(page, tier) for page in pages}
        freed = [slots for _, slots in call()]
        ids = [int(slot) for slots in freed if slots is not None for slot in slots]
        assert sorted(ids) == sorted(slot for slots in expected.values() for slot in slots)
        self.take_back(ids, ids)
        return True

    # -- pins ---------------------------------------------------------------------------------

    @rule(choice=CHOICE, tier=TIER)
    def pin(self, choice: int, tier: Tier) -> None:
        node = self.a_node(choice)
        if node is not None:
            self.pin_node(node, tier)

    def pin_node(self, node: Node, tier: Tier) -> None:
        self.forest.pin(node, tier)
        if not node.is_root:
            page = self.page_of(node)
            self.held.append((node, page, tier))
            self.model.pin(page, tier, 1)

    @rule(choice=CHOICE)
    def unpin(self, choice: int) -> None:
        if self.held:
            self.let_go(choice % len(self.held))

    def let_go(self, index: int) -> None:
        node, page, tier = self.held.pop(index)
        assert self.page_of(node) == page, "whoever holds a node still has the whole path"
        self.forest.unpin(node, tier)
        self.model.pin(page, tier, -1)

    @rule(root=ROOTS, tier=TIER)
    def pins_that_mean_nothing(self, root: int, tier: Tier) -> None:
        self.forest.pin(self.roots[root], tier)
        self.forest.unpin(self.roots[root], tier)
        while self.held_before_clear:
            self.forest.unpin(*self.held_before_clear.pop())

    # -- after every step ---------------------------------------------------------------------

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
