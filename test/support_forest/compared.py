"""A forest and its model side by side: how one is read as the other, and what must be equal."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Any

import numpy as np
from hypothesis.stateful import RuleBasedStateMachine, invariant

from support_forest.model import (
    ABSENT,
    RESIDENT,
    TIERS,
    InTier,
    Model,
    Page,
    absent_everywhere,
)
from tiered_kv.core.config import MemoryConfig
from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.key import namespace_hash
from tiered_kv.forest.largest import LargestPrefixes
from tiered_kv.forest.node import Node
from tiered_kv.forest.residency import Residency
from tiered_kv.memory.manager import MemoryManager


class ComparedForest(RuleBasedStateMachine):
    """Holds both, without rules; its invariants say that they agree."""

    page_size = 1

    def __init__(self) -> None:
        super().__init__()
        self.forest = Forest(self.page_size)
        self.largest = LargestPrefixes(self.forest)
        self.manager = MemoryManager(self.forest, MemoryConfig())
        self.roots = [self.forest.root(namespace_hash("model", i)) for i in range(2)]
        self.model = Model()
        self.n_slots = 0
        self.n_ops = 0
        self.given_back: set[int] = set()
        self.held: list[tuple[Node, Page, Tier]] = []
        self.held_before_clear: list[tuple[Node, Tier]] = []
        self.patterns = self.page_patterns()

    def page_patterns(self) -> list[list[int]]:
        if self.page_size == 1:
            return [[0], [1], [2]]
        zeros = [0] * (self.page_size - 1)
        return [[0, *zeros], [*zeros, 1], [1, *zeros]]

    # -- translation --------------------------------------------------------------------------

    def tokens(self, symbols: Iterable[int], tail: int = 0) -> array[int]:
        tokens = [token for symbol in symbols for token in self.patterns[symbol]]
        return array("q", tokens + [0] * (tail % self.page_size))

    def symbols_of(self, node: Node) -> list[int]:
        size, tokens = self.page_size, node.tokens.tolist()
        return [self.patterns.index(tokens[i : i + size]) for i in range(0, len(tokens), size)]

    def page_of(self, node: Node) -> Page:
        """The last page of `node`."""
        symbols: list[int] = []
        while not node.is_root:
            symbols[:0] = self.symbols_of(node)
            assert node.parent is not None
            node = node.parent
        return self.roots.index(node), tuple(symbols)

    def pages_of(self, node: Node) -> list[Page]:
        root, symbols = self.page_of(node)
        return self.model.path(root, symbols)[-node.n_pages :]

    def a_node(self, choice: int) -> Node | None:
        nodes = self.forest.nodes()
        return nodes[choice % len(nodes)] if nodes else None

    def an_op(self, choice: int) -> tuple[int, Tier] | None:
        ops = sorted(
            {
                (in_tier.op, tier)
                for tiers in self.model.pages.values()
                for tier, in_tier in tiers.items()
                if in_tier.op is not None
            }
        )
        return ops[choice % len(ops)] if ops else None

    def new_slots(self, n_pages: int, tier: Tier, kind: str) -> Any:
        """Slots never given out before: one per token on DEVICE, one per page on HOST."""
        if tier > Tier.HOST:
            return None
        n = n_pages * self.page_size if tier is Tier.DEVICE else n_pages
        ids = range(self.n_slots, self.n_slots + n)
        self.n_slots += n
        return {"list": list, "range": range_of, "numpy": np.array}[kind](ids)

    def cut(self, slots: Any, n_pages: int, index: int) -> tuple[int, ...]:
        if slots is None:
            return ()
        unit = len(slots) // n_pages
        return tuple(int(slot) for slot in slots[index * unit : (index + 1) * unit])

    def take_back(self, slots: Any, expected: Iterable[int]) -> None:
        ids = [] if slots is None else [int(slot) for slot in slots]
        assert ids == list(expected)
        assert self.given_back.isdisjoint(ids)
        assert len(set(ids)) == len(ids)
        self.given_back.update(ids)

    def settle(self, page: Page, tier: Tier, state: Residency, slots: Any, op: Any = None) -> None:
        self.model.pages.setdefault(page, absent_everywhere())[tier] = InTier(state, slots, op)

    def vacate(self, page: Page, tier: Tier) -> tuple[int, ...]:
        slots = self.model.pages[page][tier].slots
        self.model.pages[page][tier] = InTier()
        return slots

    # -- what must be equal --------------------------------------------------------------------

    @invariant()
    def forest_equals_model(self) -> None:
        self.model.prune()
        self.forest.check_integrity(deep=True)
        seen: dict[Page, dict[Tier, InTier]] = {}
        pins: dict[tuple[Page, Tier], int] = {}
        for node in self.forest.nodes():
            for index, page in enumerate(self.pages_of(node)):
                assert page not in seen
                seen[page] = {
                    tier: InTier(
                        node.state(tier),
                        self.cut(node.slots(tier), node.n_pages, index),
                        node.op(tier),
                    )
                    for tier in TIERS
                }
                pins.update({(page, tier): node.pins(tier) for tier in TIERS})
        assert seen == self.model.pages
        assert pins == {
            (page, tier): self.model.n_pins(page, tier)
            for page in self.model.pages
            for tier in TIERS
        }

    @invariant()
    def totals_equal_model(self) -> None:
        for tier in TIERS:
            mine = {page: tiers[tier] for page, tiers in self.model.pages.items()}
            present = [page for page, in_tier in mine.items() if in_tier.state is not ABSENT]
            resident = [page for page in present if mine[page].state is RESIDENT]
            free = [page for page in resident if not self.model.n_pins(page, tier)]
            size = self.page_size
            assert self.forest.resident_tokens(tier) == len(resident) * size
            assert self.forest.evictable_tokens(tier) == len(free) * size
            assert self.forest.protected_tokens(tier) == (len(present) - len(free)) * size
            leaves = [self.page_of(node) for node in self.forest.leaves(tier)]
            assert len(leaves) == len(set(leaves))
            assert set(leaves) == self.model.leaf_pages(tier)

    @invariant()
    def largest_prefixes_are_found(self) -> None:
        check_largest(self.forest, self.largest)

    @invariant()
    def every_slot_is_somewhere_once(self) -> None:
        held = [
            slot for tiers in self.model.pages.values() for t in TIERS for slot in tiers[t].slots
        ]
        assert len(set(held)) == len(held)
        assert self.given_back.isdisjoint(held)
        assert self.given_back.union(held) == set(range(self.n_slots))


def check_largest(forest: Forest, largest: LargestPrefixes) -> None:
    """The index equals what is counted anew, and what it picks are the largest."""
    nodes = forest.nodes()
    counted: dict[int, int] = {}
    for node in nodes:
        at: Node | None = node
        while at is not None:
            counted[at.node_id] = counted.get(at.node_id, 0) + node.n_tokens
            at = at.parent
    assert largest.sizes == counted
    assert largest.tokens == sum(node.n_tokens for node in nodes)
    for n in {0, 1, 2, len(nodes) // 2, len(nodes), len(nodes) + 1}:
        chosen = largest.largest(n)
        assert len(chosen) == len(set(chosen)) == min(n, len(nodes))
        for place, node in enumerate(chosen):
            assert node.parent is not None
            assert node.parent.is_root or node.parent in chosen[:place]
        left_out = [counted[node.node_id] for node in nodes if node not in chosen]
        if chosen and left_out:
            assert max(left_out) < 2 * min(counted[node.node_id] for node in chosen)


def range_of(ids: range) -> range:
    return ids
