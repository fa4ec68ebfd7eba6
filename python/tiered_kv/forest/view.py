"""A frozen picture of a forest, for tests and debugging."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tiered_kv.core.ids import Tier
from tiered_kv.forest.node import Node
from tiered_kv.forest.residency import Residency


@dataclass(frozen=True, slots=True)
class NodeView:
    """One node as it was."""

    node_id: int
    parent_id: int
    """Negative if the parent is a root."""
    n_tokens: int
    end: int
    last_access: int
    hits: int
    states: tuple[Residency, ...]
    """One per tier of the forest, in its order."""
    pins: tuple[int, ...]
    """One per tier of the forest, in its order."""


@dataclass(frozen=True, slots=True)
class ForestView:
    """All nodes as they were, oldest first."""

    page_size: int
    tiers: tuple[Tier, ...]
    nodes: tuple[NodeView, ...]

    def __str__(self) -> str:
        """A table for people: one line per node."""
        names = " ".join(f"{tier.name:>14}" for tier in self.tiers)
        lines = [f"{'node':>8} {'parent':>8} {'tokens':>16} {names}"]
        for node in self.nodes:
            tokens = f"{node.end - node.n_tokens}:{node.end}"
            cells = " ".join(
                f"{state.name + (f'+{pins}' if pins else ''):>14}"
                for state, pins in zip(node.states, node.pins, strict=True)
            )
            lines.append(f"{node.node_id:>8} {node.parent_id:>8} {tokens:>16} {cells}")
        return "\n".join(lines)


def view_of(page_size: int, tiers: tuple[Tier, ...], nodes: Iterable[Node]) -> ForestView:
    """The picture of `nodes`, none of which is a root."""
    return ForestView(
        page_size,
        tiers,
        tuple(
            NodeView(
                node_id=node.node_id,
                parent_id=node.parent.node_id if node.parent is not None else 0,
                n_tokens=node.n_tokens,
                end=node.end,
                last_access=node.last_access,
                hits=node.hits,
                states=tuple(node.state(tier) for tier in tiers),
                pins=tuple(node.pins(tier) for tier in tiers),
            )
            for node in nodes
        ),
    )
