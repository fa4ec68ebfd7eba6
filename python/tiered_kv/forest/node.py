"""A node of the forest: a run of pages, and one record per tier of where its KV is."""

from __future__ import annotations

from array import array
from typing import TypeAlias

from tiered_kv.core.ids import PageHash, Tier
from tiered_kv.forest.key import SHARED_TREE, TOKEN_TYPECODE, Sliceable, TreeKey
from tiered_kv.forest.residency import Residency

Tokens: TypeAlias = "array[int]"
"""Token ids as `array('q')`."""


class TierRecord:
    """What is known about one node in one tier; only `TierLedger` and `Forest` write it."""

    __slots__ = ("ahead", "children_present", "op", "pins", "slots", "state")

    def __init__(self) -> None:
        self.state = Residency.ABSENT
        self.slots: Sliceable | None = None
        self.op: int | None = None
        self.pins = 0
        self.ahead = False
        """Brought here in expectation of a request, and no request has run on it yet."""
        self.children_present = 0
        """Children that are not ABSENT in this tier."""


class Node:
    """A run of whole pages below `parent`. Compared and hashed by identity.

    Read freely, write through `Forest` only. A root stands for a namespace: it has no tokens, no
    parent, and is ABSENT everywhere. A node that left the forest has no parent either.
    """

    __slots__ = (
        "__weakref__",
        "children",
        "end",
        "hits",
        "last_access",
        "node_id",
        "page_hashes",
        "parent",
        "records",
        "root_hash",
        "tokens",
        "tree_key",
    )

    def __init__(
        self,
        node_id: int,
        parent: Node | None,
        tokens: Tokens,
        page_hashes: list[PageHash],
        end: int,
        n_records: int,
    ) -> None:
        self.node_id = node_id
        """Unique in the forest; positive, never reused. Roots have negative ids."""
        self.parent = parent
        self.children: dict[bytes, Node] = {}
        """By the bytes of the child's first page of tokens."""
        self.tokens = tokens
        self.page_hashes = page_hashes
        """One chained hash per page."""
        self.end = end
        """Tokens from the root to the end of this node, inclusive."""
        self.last_access = 0
        """Logical tick of the last match, insert or extend that went through this node."""
        self.hits = 0
        """Matches that went through this node."""
        self.records = tuple(TierRecord() for _ in range(n_records))
        """Indexed by tier."""
        self.root_hash: bytes | None = None
        """The tree's hash in a root, None in any other node."""
        self.tree_key = SHARED_TREE
        """Whose tree it is, in a root; `SHARED_TREE` in any other node, see `root`."""

    @classmethod
    def make_root(
        cls, node_id: int, root_hash: bytes, n_records: int, tree_key: TreeKey = SHARED_TREE
    ) -> Node:
        """The root of the tree `root_hash` (32 bytes), which is `tree_key`'s."""
        root = cls(node_id, None, array(TOKEN_TYPECODE), [], 0, n_records)
        root.root_hash = root_hash
        root.tree_key = tree_key
        return root

    @property
    def is_root(self) -> bool:
        return self.root_hash is not None

    @property
    def root(self) -> Node:
        """The root of the tree that this node is in; O(depth)."""
        node = self
        while node.parent is not None:
            node = node.parent
        return node

    @property
    def n_pages(self) -> int:
        return len(self.page_hashes)

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    @property
    def start(self) -> int:
        """Tokens from the root to the beginning of this node."""
        return self.end - len(self.tokens)

    @property
    def last_page_hash(self) -> PageHash:
        """Hash of the last page; the namespace's hash in a root."""
        if self.root_hash is not None:
            return self.root_hash
        return self.page_hashes[-1]

    def state(self, tier: Tier) -> Residency:
        return self.records[tier].state

    def slots(self, tier: Tier) -> Sliceable | None:
        """The slots that hold, or are about to hold, this node's pages in `tier`."""
        return self.records[tier].slots

    def op(self, tier: Tier) -> int | None:
        """Id of the transfer into `tier` under way, if there is one."""
        return self.records[tier].op

    def pins(self, tier: Tier) -> int:
        """Pins in `tier` on this node and on the nodes below it."""
        return self.records[tier].pins

    def __repr__(self) -> str:
        if self.root_hash is not None:
            return f"<root {self.root_hash.hex()[:8]}>"
        states = " ".join(record.state.value for record in self.records)
        return f"<node {self.node_id} [{self.start}:{self.end}] {states}>"
