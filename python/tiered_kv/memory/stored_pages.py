"""What the cold stores have of a prompt."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from tiered_kv.core.ids import Tier
from tiered_kv.forest.node import Node


@dataclass(frozen=True, slots=True)
class Stored:
    """The answer: which store has pages of a prompt, from page `first` on without a gap."""

    first: int
    ends: tuple[tuple[Tier, int], ...]
    """(tier, end): the pages before `end` that no tier before it in this list has."""
    hashes: list[bytes]
    first_hashed: int = 0
    """The page that the first of `hashes` is of."""

    @property
    def end(self) -> int:
        return self.ends[-1][1] if self.ends else self.first

    def between(self, first: int, end: int) -> list[tuple[Tier, list[bytes]]]:
        """The hashes of the stored pages from page `first` on, before page `end`, by store."""
        parts = []
        for tier, run_end in self.ends:
            stop = min(run_end, end)
            if first < stop:
                at = self.first_hashed
                parts.append((tier, self.hashes[first - at : stop - at]))
                first = stop
        return parts


def prompt_of(node: Node, tokens: array[int]) -> tuple[Node, array[int]]:
    """The root above `node`, and all tokens from there: those of the path, then `tokens`."""
    path = []
    at = node
    while at.parent is not None:
        path.append(at.tokens)
        at = at.parent
    prompt = array("q")
    for run in reversed(path):
        prompt.extend(run)
    prompt.extend(tokens)
    return at, prompt
