"""Which nodes a transfer moves, found by the transfer's id."""

from __future__ import annotations

from tiered_kv.core.ids import Tier
from tiered_kv.forest.node import Node


class TransferIndex:
    """Nodes by (transfer id, receiving tier), kept right when a node is split under way."""

    __slots__ = ("_nodes",)

    def __init__(self) -> None:
        self._nodes: dict[tuple[int, Tier], dict[Node, None]] = {}

    def add(self, op: int, tier: Tier, node: Node) -> None:
        """`node` is being moved into `tier` by transfer `op`."""
        node.records[tier].op = op
        self._nodes.setdefault((op, tier), {})[node] = None

    def nodes(self, op: int, tier: Tier) -> list[Node]:
        """Nodes that `op` moves into `tier`, each before the nodes below it."""
        # A split appends the upper half behind the lower, so the order of insertion won't do.
        return sorted(self._nodes.get((op, tier), ()), key=_top_down)

    def drop(self, op: int, tier: Tier) -> None:
        """Forget that `op` moves nodes into `tier`."""
        for node in self._nodes.pop((op, tier), ()):
            node.records[tier].op = None

    def tiers(self, op: int) -> list[Tier]:
        """Tiers that `op` moves nodes into."""
        return [tier for tier in Tier if (op, tier) in self._nodes]

    def items(self) -> list[tuple[int, Tier, Node]]:
        """Every node in transfer."""
        return [(op, tier, node) for (op, tier), nodes in self._nodes.items() for node in nodes]

    def clear(self) -> None:
        """Forget every transfer."""
        self._nodes.clear()


def _top_down(node: Node) -> tuple[int, int]:
    return node.end, node.node_id
