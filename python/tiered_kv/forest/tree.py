"""The trees of the forest: nodes, how they are found, made, split and forgotten, and their pins."""

from __future__ import annotations

from collections.abc import Callable, Iterator, KeysView
from typing import Protocol
from weakref import WeakValueDictionary

from tiered_kv.core.clock import LogicalClock
from tiered_kv.core.errors import IntegrityError
from tiered_kv.core.ids import PAGE_HASH_BYTES, Tier
from tiered_kv.forest import integrity
from tiered_kv.forest.descent import Descent, descend, whole_pages
from tiered_kv.forest.key import SHARED_TREE, TreeKey, page_hashes
from tiered_kv.forest.ledger import TierLedger
from tiered_kv.forest.node import Node, Tokens
from tiered_kv.forest.residency import Residency
from tiered_kv.forest.transfer import TransferIndex
from tiered_kv.forest.view import ForestView, view_of

_ABSENT = Residency.ABSENT

__all__ = ["Node", "NodeWatcher", "Trees"]


class NodeWatcher(Protocol):
    """Is told of every node that comes, goes or is split, right after it happened."""

    def added(self, node: Node) -> None: ...

    def removed(self, node: Node, parent: Node) -> None:
        """`node`, which had no children, was below `parent`."""

    def split(self, upper: Node, lower: Node) -> None: ...

    def cleared(self) -> None:
        """All nodes are gone; roots stay."""


class Trees:
    """One radix tree per namespace, with pins and per-tier totals; the base of `Forest`.

    A node stays while DEVICE or HOST holds it, a transfer or a pin uses it, or a child needs it.
    Farther tiers are addressed by content and found again without it.
    """

    def __init__(
        self,
        page_size: int,
        *,
        tiers: tuple[Tier, ...] = (Tier.DEVICE, Tier.HOST, Tier.DISK),
    ) -> None:
        """`page_size` in tokens, at least 1; `tiers` are those that nodes can be resident in."""
        if page_size < 1:
            raise IntegrityError(f"A page has at least one token, not {page_size}.")
        self.page_size = page_size
        self.tiers = tiers
        self._ledgers = {tier: TierLedger(tier) for tier in tiers}
        self._n_records = max(tiers) + 1
        self._nodes: dict[int, Node] = {}
        # A root lives as long as a child or a caller refers to it, so that namespaces that come
        # and go (one per tenant or session) leave nothing behind.
        self._roots: WeakValueDictionary[bytes, Node] = WeakValueDictionary()
        self._transfers = TransferIndex()
        self._clock = LogicalClock()
        self._split_watchers: list[Callable[[Node, Node], None]] = []
        self._watchers: list[NodeWatcher] = []
        self._n_ids = 0
        self._n_root_ids = 0

    # -- nodes --------------------------------------------------------------------------------

    def root(self, root_hash: bytes, tree_key: TreeKey = SHARED_TREE) -> Node:
        """The root of the tree `root_hash` (32 bytes), made on demand as that of `tree_key`."""
        root = self._roots.get(root_hash)
        if root is None:
            if len(root_hash) != PAGE_HASH_BYTES:
                raise IntegrityError(
                    f"A namespace hash has {PAGE_HASH_BYTES} bytes, not {len(root_hash)}."
                )
            self._n_root_ids += 1
            root = Node.make_root(-self._n_root_ids, root_hash, self._n_records, tree_key)
            self._roots[root_hash] = root
        return root

    def roots(self) -> list[Node]:
        """The roots in use: those with nodes below them, and those a caller holds."""
        return list(self._roots.values())

    def nodes(self) -> list[Node]:
        """All nodes except roots, oldest first."""
        return list(self._nodes.values())

    def find(self, node_id: int) -> Node | None:
        """The node called `node_id`, or None if it left the forest."""
        return self._nodes.get(node_id)

    def node(self, node_id: int) -> Node:
        """The node called `node_id`. Raises IntegrityError if it left the forest."""
        try:
            return self._nodes[node_id]
        except KeyError:
            raise IntegrityError(f"Node {node_id} is not in the forest.") from None

    def __contains__(self, node: Node) -> bool:
        """Whether `node` (not a root) is still in the forest; O(1)."""
        return self._nodes.get(node.node_id) is node

    def __len__(self) -> int:
        """Nodes in the forest, roots not counted."""
        return len(self._nodes)

    @property
    def now(self) -> int:
        """The logical tick; `Node.last_access` is what it was when a node was used last."""
        return self._clock.now()

    def peek(self, node: Node, tokens: Tokens, limit: int | None = None) -> Descent:
        """How far the first `limit` tokens of a prompt are known below `node`, in whole pages.

        `tokens` are the prompt's from the root on; those down to `node` are taken to be its path.
        Looking is no use: nothing is touched, counted or split.
        """
        end = whole_pages(tokens, self.page_size, limit)
        return descend(node, tokens, end, self.page_size, node.end)

    def split(self, node: Node, n_pages: int) -> tuple[Node, Node]:
        """Cut `node` after `n_pages` pages; returns (upper, lower).

        The lower half stays the same object, so whoever holds or pinned the node still has the
        whole path. The upper half inherits states, pins, transfers, recency and its slots.
        """
        self._require_known(node)
        if not 0 < n_pages < node.n_pages:
            raise IntegrityError(f"A node of {node.n_pages} pages has no cut after {n_pages}.")
        parent = _parent(node)
        cut = n_pages * self.page_size
        upper = self._new_node(parent, node.tokens[:cut], node.page_hashes[:n_pages])
        upper.last_access, upper.hits = node.last_access, node.hits
        for tier in self.tiers:
            self._split_record(upper, node, tier, n_pages)
        parent.children[self._key(node)] = upper
        node.tokens = node.tokens[cut:]
        node.page_hashes = node.page_hashes[n_pages:]
        node.parent = upper
        upper.children[self._key(node)] = node
        for watcher in self._split_watchers:
            watcher(upper, node)
        return upper, node

    def watch_splits(self, watcher: Callable[[Node, Node], None]) -> None:
        """Have `watcher` called with (upper, lower) whenever a node was split."""
        self._split_watchers.append(watcher)

    def watch(self, watcher: NodeWatcher) -> None:
        """Have `watcher` told of all that happens to nodes from now on."""
        self._watchers.append(watcher)
        self._split_watchers.append(watcher.split)

    def clear(self) -> None:
        """Drop every node, pin and transfer; roots stay. The caller frees all slots."""
        for node in self._nodes.values():
            node.parent = None
            node.children.clear()
        for root in self.roots():
            root.children.clear()
            for record in root.records:
                record.children_present = 0
        self._nodes.clear()
        self._transfers.clear()
        for ledger in self._ledgers.values():
            ledger.clear()
        for watcher in self._watchers:
            watcher.cleared()

    # -- pins and totals ----------------------------------------------------------------------

    def pin(self, node: Node, tier: Tier) -> None:
        """Forbid evicting `node` and its ancestors from `tier`; a root takes no pins."""
        if not node.is_root:
            self._require_known(node)
            self._ledgers[tier].pin(node)

    def unpin(self, node: Node, tier: Tier) -> None:
        """Take back one `pin`. A node that `clear` dropped has no pins left: nothing to do."""
        if node.is_root or node not in self:
            return
        if node.records[tier].pins < 1:
            raise IntegrityError(f"Node {node.node_id} has no pin in {tier.name} to take back.")
        self._ledgers[tier].unpin(node)
        self._prune(node)

    def evictable_tokens(self, tier: Tier) -> int:
        """Tokens of nodes that are RESIDENT in `tier` and not pinned there."""
        return self._ledgers[tier].evictable_tokens

    def protected_tokens(self, tier: Tier) -> int:
        """Tokens of nodes that hold slots in `tier` and are pinned there or in transfer."""
        return self._ledgers[tier].protected_tokens

    def resident_tokens(self, tier: Tier) -> int:
        """Tokens of nodes that are RESIDENT in `tier`, pinned or not."""
        return self._ledgers[tier].resident_tokens

    def leaves(self, tier: Tier) -> KeysView[Node]:
        """Nodes that may be evicted from `tier` now, as a live set in a deterministic order."""
        return self._ledgers[tier].leaves

    def leaf_sequence(self, tier: Tier) -> int:
        """A number that grows whenever `leaves(tier)` gains a node."""
        return self._ledgers[tier].leaf_sequence

    def leaves_after(self, tier: Tier, sequence: int) -> Iterator[Node]:
        """Nodes that joined `leaves(tier)` after `leaf_sequence(tier)` was `sequence`."""
        return self._ledgers[tier].leaves_after(sequence)

    # -- inspection ---------------------------------------------------------------------------

    def check_integrity(self, *, deep: bool = False) -> None:
        """Recompute everything that is kept incrementally; raises IntegrityError if it differs.

        O(nodes); `deep` also recomputes every page hash.
        """
        integrity.check(
            self.page_size, self.tiers, self.roots(), self._nodes, self._ledgers, self._transfers
        )
        if deep:
            integrity.check_hashes(self.page_size, self._nodes.values())

    def view(self) -> ForestView:
        """A frozen picture of all nodes, for tests and debugging."""
        return view_of(self.page_size, self.tiers, self._nodes.values())

    # -- for Forest ---------------------------------------------------------------------------

    def _descend(self, start: Node, tokens: Tokens, end: int) -> tuple[list[Node], int]:
        """Follow `tokens[:end]` below `start`, split where they part, touch the path."""
        path, position, partial, common = descend(start, tokens, end, self.page_size)
        if partial is not None:
            path.append(self.split(partial, common // self.page_size)[0])
            position += common
        tick = self._clock.tick()
        for node in path:
            node.last_access = tick
        return path, position

    def _touch_ancestors(self, node: Node) -> None:
        tick = self._clock.now()
        current: Node | None = node
        while current is not None:
            current.last_access = tick
            current = current.parent

    def _add_node(self, parent: Node, tokens: Tokens) -> Node:
        """A new node of `tokens`, which it owns from now on."""
        hashes = page_hashes(parent.last_page_hash, tokens, self.page_size)
        node = self._new_node(parent, tokens, hashes)
        node.last_access = self._clock.now()
        parent.children[self._key(node)] = node
        for watcher in self._watchers:
            watcher.added(node)
        return node

    def _prune(self, node: Node) -> None:
        """Forget `node`, then its ancestors, as long as nothing needs them."""
        # Without a parent it is a root, or was forgotten with one of its descendants just before.
        while (parent := node.parent) is not None and not node.children and self._is_unneeded(node):
            for tier in self.tiers:
                if node.records[tier].state is not _ABSENT:
                    self._ledgers[tier].change_state(node, _ABSENT)
            del parent.children[self._key(node)]
            del self._nodes[node.node_id]
            node.parent = None
            for watcher in self._watchers:
                watcher.removed(node, parent)
            node = parent

    def _require_known(self, node: Node) -> None:
        if node not in self:
            raise IntegrityError(f"{node!r} is not in the forest.")

    # -- internals ----------------------------------------------------------------------------

    def _new_node(self, parent: Node, tokens: Tokens, hashes: list[bytes]) -> Node:
        self._n_ids += 1
        end = parent.end + len(tokens)
        node = Node(self._n_ids, parent, tokens, hashes, end, self._n_records)
        self._nodes[node.node_id] = node
        return node

    def _key(self, node: Node) -> bytes:
        return node.tokens[: self.page_size].tobytes()

    def _split_record(self, upper: Node, lower: Node, tier: Tier, n_pages: int) -> None:
        above, below = upper.records[tier], lower.records[tier]
        above.state, above.pins, above.ahead = below.state, below.pins, below.ahead
        above.children_present = int(below.state is not _ABSENT)
        slots = below.slots
        if slots is not None:
            cut = n_pages * (len(slots) // lower.n_pages)
            above.slots, below.slots = slots[:cut], slots[cut:]
        if below.op is not None:
            self._transfers.add(below.op, tier, upper)

    def _is_unneeded(self, node: Node) -> bool:
        for tier in self.tiers:
            record = node.records[tier]
            if record.pins or record.op is not None:
                return False
            if tier <= Tier.HOST and record.state is not _ABSENT:
                return False
        return True


def _parent(node: Node) -> Node:
    assert node.parent is not None, "a node in the forest has a parent"
    return node.parent
