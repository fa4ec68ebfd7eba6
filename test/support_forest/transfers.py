"""What happens to nodes that are there: evictions, transfers and pins, against the model."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import rule

from support_forest.compared import ComparedForest
from support_forest.model import ABSENT, RESIDENT, Page, is_prefix
from support_forest.strategies import (
    CHOICE,
    IN_TRANSFER,
    ROOTS,
    SLOT_KIND,
    TIER,
)
from tiered_kv.core.errors import IntegrityError
from tiered_kv.core.ids import Tier
from tiered_kv.forest.node import Node
from tiered_kv.forest.residency import Residency


class TransferRules(ComparedForest):
    """Any of them on any node at any time: it works, or is refused, as the model says."""

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
