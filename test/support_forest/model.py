"""A naive model of the forest: a dict from page to its state, slots and transfer per tier.

A page is named by its namespace and all pages up to it. The model knows no nodes, so it can't share
the forest's mistakes about splitting.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from tiered_kv.core.ids import Tier
from tiered_kv.forest.residency import Residency

ABSENT, RESIDENT = Residency.ABSENT, Residency.RESIDENT
TIERS = (Tier.DEVICE, Tier.HOST, Tier.DISK)

Page = tuple[int, tuple[int, ...]]  # namespace, pages up to and with this one


@dataclass
class InTier:
    state: Residency = ABSENT
    slots: tuple[int, ...] = ()
    op: int | None = None


def absent_everywhere() -> dict[Tier, InTier]:
    return {tier: InTier() for tier in TIERS}


@dataclass
class Model:
    pages: dict[Page, dict[Tier, InTier]] = field(default_factory=dict)
    pins: Counter[tuple[Page, Tier]] = field(default_factory=Counter)

    def pin(self, page: Page, tier: Tier, n: int) -> None:
        for above in self.path(*page):
            self.pins[above, tier] += n

    def n_pins(self, page: Page, tier: Tier) -> int:
        return self.pins[page, tier]

    def children(self, page: Page) -> list[Page]:
        possible = [(page[0], (*page[1], symbol)) for symbol in (0, 1, 2)]
        return [child for child in possible if child in self.pages]

    def present_children(self, page: Page, tier: Tier) -> list[Page]:
        return [c for c in self.children(page) if self.pages[c][tier].state is not ABSENT]

    def may_come(self, page: Page, tier: Tier) -> bool:
        """Whether DEVICE would stay prefix-closed with `page` there."""
        above = parent(page)
        in_root = not above[1]
        return tier is not Tier.DEVICE or in_root or self.pages[above][tier].state is not ABSENT

    def leaf_pages(self, tier: Tier) -> set[Page]:
        return {
            page
            for page, tiers in self.pages.items()
            if tiers[tier].state is RESIDENT
            and not self.n_pins(page, tier)
            and not self.present_children(page, tier)
        }

    def known(self, root: int, symbols: Sequence[int]) -> int:
        """How many leading pages are known."""
        n = 0
        while n < len(symbols) and (root, tuple(symbols[: n + 1])) in self.pages:
            n += 1
        return n

    def path(self, root: int, symbols: Sequence[int]) -> list[Page]:
        return [(root, tuple(symbols[: n + 1])) for n in range(len(symbols))]

    def of_op(self, op: int, tier: Tier) -> list[Page]:
        pages = [page for page, tiers in self.pages.items() if tiers[tier].op == op]
        return sorted(pages, key=lambda page: len(page[1]))

    def prune(self) -> None:
        needed: set[Page] = set()
        for page, tiers in self.pages.items():
            held = any(tiers[tier].state is not ABSENT for tier in (Tier.DEVICE, Tier.HOST))
            moving = any(tiers[tier].op is not None for tier in TIERS)
            pinned = any(self.n_pins(page, tier) for tier in TIERS)
            if held or moving or pinned:
                needed.update(self.path(*page))
        self.pages = {page: tiers for page, tiers in self.pages.items() if page in needed}

    def freeable(self, tier: Tier) -> int:
        """Pages that evicting leaves, again and again, would free."""
        left = {page for page, tiers in self.pages.items() if tiers[tier].state is not ABSENT}
        n_before = len(left)
        progress = True
        while progress:
            progress = False
            for page in sorted(left, key=lambda page: -len(page[1])):
                alone = not any(child in left for child in self.children(page))
                mine = self.pages[page][tier]
                if alone and mine.state is RESIDENT and not self.n_pins(page, tier):
                    left.discard(page)
                    progress = True
        return n_before - len(left)


def parent(page: Page) -> Page:
    return page[0], page[1][:-1]


def is_prefix(page: Page, of: Page) -> bool:
    return page[0] == of[0] and of[1][: len(page[1])] == page[1]
