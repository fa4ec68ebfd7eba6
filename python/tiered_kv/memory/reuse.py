"""How probable it is that a leaf is used again before its turn to go: learned, class by class."""

from __future__ import annotations

from typing import NamedTuple

from tiered_kv.forest.node import Node
from tiered_kv.memory.uses import USES_MAX

#: Before anything was observed, by uses so far: most prompts are never seen again, but those that
#: were seen twice mostly are.
PRIOR = (0.25, 0.5, 0.65, 0.8)
#: How many observations the prior is worth.
PRIOR_WEIGHT = 16.0
#: Beyond this many observations all count half: traffic changes.
OBSERVATIONS_MAX = 2000.0


class ReuseClass(NamedTuple):
    """What leaves have in common that are about as likely to be used again."""

    uses: int
    """0 to USES_MAX; of a continuation, at least the turns before it."""
    is_continuation: bool
    """It alone continues its parent, as a conversation's last turn does; else it is one of several,
    as prompts below shared instructions are, or the first of its tree."""


def class_of(node: Node, uses: int) -> ReuseClass:
    """The class of `node`, used `uses` times since it was made.

    A conversation's last turn is new and has never been used, but every turn before it was.
    """
    turns = 0
    parent = node.parent
    while (
        turns < USES_MAX and parent is not None and not parent.is_root and len(parent.children) == 1
    ):
        turns += 1
        parent = parent.parent
    return ReuseClass(min(max(uses, turns), USES_MAX), turns > 0)


class ReuseEstimator:
    """Counts per class how many leaves were used again and how many had to go first."""

    def __init__(self) -> None:
        self._used: dict[ReuseClass, float] = {}
        self._gone: dict[ReuseClass, float] = {}

    def probability(self, kind: ReuseClass) -> float:
        """Between 0 and 1, exclusive."""
        used, gone = self._used.get(kind, 0.0), self._gone.get(kind, 0.0)
        prior = PRIOR[kind.uses]
        return (used + PRIOR_WEIGHT * prior) / (used + gone + PRIOR_WEIGHT)

    def used(self, kind: ReuseClass) -> None:
        """A leaf of this class was used again."""
        self._used[kind] = self._used.get(kind, 0.0) + 1.0
        self._halve_if_full(kind)

    def gone(self, kind: ReuseClass) -> None:
        """A leaf of this class had to go."""
        self._gone[kind] = self._gone.get(kind, 0.0) + 1.0
        self._halve_if_full(kind)

    def came_back(self, kind: ReuseClass) -> None:
        """One that was counted as gone was needed after all."""
        self._gone[kind] = max(0.0, self._gone.get(kind, 0.0) - 1.0)
        self.used(kind)

    def _halve_if_full(self, kind: ReuseClass) -> None:
        if self._used.get(kind, 0.0) + self._gone.get(kind, 0.0) > OBSERVATIONS_MAX:
            self._used[kind] = self._used.get(kind, 0.0) / 2
            self._gone[kind] = self._gone.get(kind, 0.0) / 2
