"""Which of the running requests begin alike, for a policy that has whole gangs decode together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from tiered_kv.attention.payoff import MIN_SHARED_TOKENS

if TYPE_CHECKING:
    from tiered_kv.forest.node import Node

#: (id of the gang's node, tokens that its members share)
Gang = tuple[int, int]


def gangs_of(last_nodes: Iterable[Node | None]) -> list[Gang | None]:
    """The gang of each request, given the last node of its prefix; None: it is alone.

    It is the node of its path below which the most tokens are read again: (requests below it, less
    one) x its depth. Nodes less deep than cascade attention reads together don't count. In time
    proportional to the paths' nodes.
    """
    paths = [_path(node) for node in last_nodes]
    counts: dict[int, int] = {}
    for path in paths:
        for node in path:
            counts[node.node_id] = counts.get(node.node_id, 0) + 1
    return [_best(path, counts) for path in paths]


def _path(node: Node | None) -> list[Node]:
    """Deepest first; without the root, and without what is too short."""
    path = []
    while node is not None and not node.is_root and node.end >= MIN_SHARED_TOKENS:
        path.append(node)
        node = node.parent
    return path


def _best(path: list[Node], counts: Mapping[int, int]) -> Gang | None:
    best = max(path, key=lambda node: (counts[node.node_id] - 1) * node.end, default=None)
    if best is None or counts[best.node_id] == 1:
        return None
    return best.node_id, best.end
