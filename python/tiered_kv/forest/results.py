"""What `Forest.match` and `Forest.insert` answer."""

from __future__ import annotations

from dataclasses import dataclass

from tiered_kv.forest.node import Node


@dataclass(frozen=True, slots=True)
class Match:
    """The longest known prefix of a prompt, in whichever tiers its nodes may be."""

    root: Node
    path: tuple[Node, ...]
    """From the root's child to the last node matched, each matched in full."""
    n_tokens: int
    """Tokens matched; a multiple of the page size."""

    @property
    def last(self) -> Node:
        """The last node matched; the root if nothing was."""
        return self.path[-1] if self.path else self.root


@dataclass(frozen=True, slots=True)
class InsertResult:
    """What an insert did with the slots it was given."""

    resident_tokens: int
    """Leading tokens that had slots in the tier already; the caller frees the new ones."""
    last: Node
    """The node that ends where the inserted tokens end; the root if they filled no page."""
    adopted: tuple[Node, ...]
    """Nodes that became RESIDENT by this insert: new ones, and old ones ABSENT until now."""
