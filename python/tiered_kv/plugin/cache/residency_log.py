"""What became cached or ceased to be, for those who wait: the waiting queue looks it up again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from tiered_kv.core.ids import Tier
from tiered_kv.forest.node import Node

if TYPE_CHECKING:
    from tiered_kv.tiers.context import TierListener


class ResidencyLog:
    """Notes nodes that came to the device or the host, or left them; passes all on to `inner`.

    Only while somebody waits: who arrives later is looked up then.
    """

    def __init__(self, inner: TierListener) -> None:
        self._inner = inner
        self._nodes: dict[int, Node] = {}
        self.is_wanted = False

    def stored(self, node: Node, tier: Tier) -> None:
        self._note(node, tier)
        self._inner.stored(node, tier)

    def removed(self, node: Node, tier: Tier) -> None:
        self._note(node, tier)
        self._inner.removed(node, tier)

    def _note(self, node: Node, tier: Tier) -> None:
        if self.is_wanted and tier <= Tier.HOST:
            self._nodes[node.node_id] = node

    def note(self, nodes: Iterable[Node]) -> None:
        """`nodes` may not be what they were, though no tier said so."""
        self._nodes.update((node.node_id, node) for node in nodes)

    def take(self) -> list[Node]:
        """The nodes noted since the last call."""
        nodes = list(self._nodes.values())
        self._nodes.clear()
        return nodes
