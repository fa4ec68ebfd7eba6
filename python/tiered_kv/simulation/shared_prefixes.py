"""How much of what several prompts read is the same, kept up as prompts come and go."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(slots=True)
class _Edge:
    end: int
    """Number of the point in the tree that it leads to."""
    users: int = 0
    """Prompts that go through it."""


class SharedPrefixes:
    """A tree over block ids; each change costs its prompt's blocks, whatever else is in the tree.

    As cascade attention at every level reads it: a block that k prompts begin with is read once.
    """

    def __init__(self) -> None:
        self.n_saved = 0
        """Blocks of all prompts together, less the different ones among them."""
        self._edges: dict[tuple[int, int], _Edge] = {}
        self._n_points = 0

    def add(self, blocks: Iterable[int]) -> None:
        """A prompt that begins with `blocks`."""
        at = 0
        for block in blocks:
            edge = self._edges.get((at, block))
            if edge is None:
                self._n_points += 1
                edge = self._edges[at, block] = _Edge(self._n_points)
            else:
                self.n_saved += 1
            edge.users += 1
            at = edge.end

    def remove(self, blocks: Iterable[int]) -> None:
        """A prompt that was added with the same `blocks` goes."""
        at = 0
        for block in blocks:
            edge = self._edges[at, block]
            edge.users -= 1
            if edge.users:
                self.n_saved -= 1
            else:
                del self._edges[at, block]
            at = edge.end
