"""Per-tier totals that answer in O(1) what may be evicted, kept right at every change."""

from __future__ import annotations

from collections.abc import Iterator, KeysView

from tiered_kv.core.ids import Tier
from tiered_kv.forest.node import Node
from tiered_kv.forest.residency import Residency, check_transition

_ABSENT = Residency.ABSENT
_RESIDENT = Residency.RESIDENT


class TierLedger:
    """Totals and evictable leaves of one tier.

    Every token of a node that is not ABSENT counts as evictable (RESIDENT and not pinned) or as
    protected (pinned, or in transfer). A leaf may be evicted now: RESIDENT, not pinned, and no
    child of it present in the tier.
    """

    __slots__ = (
        "_leaf_sequence",
        "_leaves",
        "evictable_tokens",
        "protected_tokens",
        "resident_tokens",
        "tier",
    )

    def __init__(self, tier: Tier) -> None:
        self.tier = tier
        self.evictable_tokens = 0
        self.protected_tokens = 0
        self.resident_tokens = 0
        # A dict, not a set: its order is the same on every rank. The values grow, so whoever
        # remembers the last value it saw finds what is new at the end.
        self._leaves: dict[Node, int] = {}
        self._leaf_sequence = 0

    @property
    def leaves(self) -> KeysView[Node]:
        return self._leaves.keys()

    @property
    def leaf_sequence(self) -> int:
        """Number of the newest leaf; numbers only grow."""
        return self._leaf_sequence

    def leaves_after(self, sequence: int) -> Iterator[Node]:
        """Leaves that became so after number `sequence`, newest first, in O(their number)."""
        for node, number in reversed(self._leaves.items()):
            if number <= sequence:
                return
            yield node

    def change_state(self, node: Node, state: Residency) -> None:
        """Move `node` to `state`; raises IntegrityError if that step is not allowed."""
        record = node.records[self.tier]
        old = record.state
        check_transition(old, state)
        n_tokens = len(node.tokens)
        if old is not _ABSENT:
            self._count(-n_tokens, old, record.pins)
        record.state = state
        if state is not _ABSENT:
            self._count(n_tokens, state, record.pins)
        self._update_leaf(node)
        if (old is _ABSENT) != (state is _ABSENT):
            parent = node.parent
            assert parent is not None, "a root has no state"
            parent.records[self.tier].children_present += 1 if old is _ABSENT else -1
            self._update_leaf(parent)

    def pin(self, node: Node) -> None:
        """Count one more pin on `node` and on each of its ancestors."""
        tier = self.tier
        current = node
        # The parent is read first: it is None exactly for a root, which takes no pins.
        while (parent := current.parent) is not None:
            record = current.records[tier]
            record.pins += 1
            if record.pins == 1 and record.state is _RESIDENT:
                n_tokens = len(current.tokens)
                self.evictable_tokens -= n_tokens
                self.protected_tokens += n_tokens
                self._leaves.pop(current, None)
            current = parent

    def unpin(self, node: Node) -> None:
        """Take back one `pin` of `node`."""
        tier = self.tier
        current = node
        while (parent := current.parent) is not None:
            record = current.records[tier]
            record.pins -= 1
            if record.pins == 0 and record.state is _RESIDENT:
                n_tokens = len(current.tokens)
                self.evictable_tokens += n_tokens
                self.protected_tokens -= n_tokens
                if record.children_present == 0:
                    self._add_leaf(current)
            current = parent

    def clear(self) -> None:
        """Forget every node."""
        self.evictable_tokens = 0
        self.protected_tokens = 0
        self.resident_tokens = 0
        self._leaves.clear()

    def _count(self, n_tokens: int, state: Residency, pins: int) -> None:
        if state is _RESIDENT:
            self.resident_tokens += n_tokens
            if pins == 0:
                self.evictable_tokens += n_tokens
                return
        self.protected_tokens += n_tokens

    def _update_leaf(self, node: Node) -> None:
        record = node.records[self.tier]
        if record.state is _RESIDENT and record.pins == 0 and record.children_present == 0:
            if node not in self._leaves:
                self._add_leaf(node)
        else:
            self._leaves.pop(node, None)

    def _add_leaf(self, node: Node) -> None:
        self._leaf_sequence += 1
        self._leaves[node] = self._leaf_sequence
