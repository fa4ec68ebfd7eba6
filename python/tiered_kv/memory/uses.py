"""How often nodes were used, as far as an eviction policy sees it."""

from __future__ import annotations

from tiered_kv.forest.forest import Forest
from tiered_kv.forest.node import Node

#: Beyond this count a node is popular, and how popular does not matter.
USES_MAX = 3


class UseCounter:
    """Uses by node id, seen between one look at a node and the next.

    Not `Node.hits`: a request that waits is matched again and again, which is one use. Whatever
    happens between two looks counts once; a node that is looked at for the first time has none.
    """

    _SLACK = 1024

    def __init__(self, forest: Forest) -> None:
        self._forest = forest
        self._seen: dict[int, tuple[int, int]] = {}

    def uses(self, node: Node) -> int:
        """Between 0 and USES_MAX."""
        known = self._seen.get(node.node_id)
        return known[1] if known else 0

    def look(self, node: Node) -> bool:
        """Whether the node was used since the last look; then counts it."""
        known = self._seen.get(node.node_id)
        if known is None:
            self._seen[node.node_id] = (node.last_access, 0)
            self._forget()
            return False
        last_access, uses = known
        if last_access == node.last_access:
            return False
        self._seen[node.node_id] = (node.last_access, min(uses + 1, USES_MAX))
        return True

    def set(self, node: Node, uses: int) -> None:
        """Count from `uses` on."""
        self._seen[node.node_id] = (node.last_access, min(max(uses, 0), USES_MAX))

    def _forget(self) -> None:
        if len(self._seen) > 2 * len(self._forest) + self._SLACK:
            find = self._forest.find
            self._seen = {k: v for k, v in self._seen.items() if find(k) is not None}
