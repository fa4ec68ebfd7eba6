"""What all eviction policies share: from the leaves up, until enough pages have been found."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, TypeAlias

from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.node import Node
from tiered_kv.forest.residency import Residency

MayGo: TypeAlias = Callable[[Node], bool]


class EvictionOrder(Protocol):
    """One tier's candidates in the order in which a policy gives them up.

    It keeps node ids rather than nodes: entries must not keep forgotten nodes in memory.
    """

    def refresh(self) -> None:
        """Take in the leaves that are new since the last call."""
        ...

    def add(self, node: Node) -> None:
        """`node` would become a leaf if the victims named so far were gone."""
        ...

    def pop(self, may_go: MayGo) -> Node | None:
        """Take out the next candidate for which `may_go` holds; None if there is none."""
        ...

    def put_back(self, victims: Iterable[Node]) -> None:
        """`victims`, as popped, may stay after all: be ready to name them first the next time."""
        ...


def find_victims(forest: Forest, tier: Tier, order: EvictionOrder, n_pages: int) -> list[Node]:
    """See `Eviction.victims`. Asks `order` for O(victims) candidates, not for all."""
    order.refresh()
    leaves = forest.leaves(tier)
    # What the forest would look like with the victims gone: children left per node, and the nodes
    # that thereby became leaves.
    children_left: dict[Node, int] = {}
    uncovered: set[Node] = set()
    victims: dict[Node, None] = {}

    def may_go(node: Node) -> bool:
        return node not in victims and (node in leaves or node in uncovered)

    found = 0
    while found < n_pages:
        node = order.pop(may_go)
        if node is None:
            break
        victims[node] = None
        found += node.n_pages
        parent = node.parent
        if parent is None or parent.is_root:
            continue
        record = parent.records[tier]
        left = children_left.get(parent, record.children_present) - 1
        children_left[parent] = left
        if left == 0 and record.state is Residency.RESIDENT and record.pins == 0:
            uncovered.add(parent)
            order.add(parent)
    # The caller may not carry it out, so what was popped goes back; if it does, the entries are
    # stale and fall out at the next call.
    order.put_back(victims)
    return list(victims)


class NewLeaves:
    """The leaves of one tier that joined since the last look."""

    def __init__(self, forest: Forest, tier: Tier) -> None:
        self._forest = forest
        self._tier = tier
        self._seen = 0

    def take(self) -> list[Node]:
        """Oldest first."""
        nodes = list(self._forest.leaves_after(self._tier, self._seen))
        self._seen = self._forest.leaf_sequence(self._tier)
        nodes.reverse()
        return nodes
