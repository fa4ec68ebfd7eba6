"""The radix forest: prefixes, where they live, and who needs them.

One tree per namespace; a node is a run of whole pages. The forest holds opaque slots and decides
nothing: callers say what was computed, moved, read or evicted, and the forest refuses, with an
IntegrityError, what would make its picture untrue. Not thread-safe: one thread owns it.

Two rules that hold at all times:

* DEVICE residency is prefix-closed: a node that is not ABSENT there has a parent that is not
  ABSENT there either, since attention reads the whole prefix.
* A node stays in memory while DEVICE or HOST holds it, a transfer or a pin uses it, or a child
  needs it. Farther tiers are addressed by content and found again without it.
"""

from __future__ import annotations

from collections.abc import Iterator, KeysView
from weakref import WeakValueDictionary

from tiered_kv.core.clock import LogicalClock
from tiered_kv.core.errors import IntegrityError
from tiered_kv.core.ids import PAGE_HASH_BYTES, Tier
from tiered_kv.forest import integrity
from tiered_kv.forest.key import Sliceable, page_hashes
from tiered_kv.forest.ledger import TierLedger
from tiered_kv.forest.node import Node, Tokens
from tiered_kv.forest.residency import IN_TRANSFER, Residency
from tiered_kv.forest.results import InsertResult, Match
from tiered_kv.forest.transfer import TransferIndex
from tiered_kv.forest.tree import descend, whole_pages
from tiered_kv.forest.view import ForestView, view_of

_ABSENT = Residency.ABSENT
_RESIDENT = Residency.RESIDENT


class Forest:
    """Trees of pages with per-tier residency, pins and totals."""

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
        self._n_ids = 0
        self._n_root_ids = 0

    # -- nodes --------------------------------------------------------------------------------

    def root(self, root_hash: bytes) -> Node:
        """The root of namespace `root_hash` (32 bytes), made on demand."""
        root = self._roots.get(root_hash)
        if root is None:
            if len(root_hash) != PAGE_HASH_BYTES:
                raise IntegrityError(
                    f"A namespace hash has {PAGE_HASH_BYTES} bytes, not {len(root_hash)}."
                )
            self._n_root_ids += 1
            root = Node.make_root(-self._n_root_ids, root_hash, self._n_records)
            self._roots[root_hash] = root
        return root

    def roots(self) -> list[Node]:
        """The roots in use."""
        return list(self._roots.values())

    def nodes(self) -> list[Node]:
        """All nodes except roots, oldest first."""
        return list(self._nodes.values())

    def node(self, node_id: int) -> Node:
        """The node called `node_id`. Raises IntegrityError if it left the forest."""
        try:
            return self._nodes[node_id]
        except KeyError:
            raise IntegrityError(f"Node {node_id} is not in the forest.") from None

    def __contains__(self, node: Node) -> bool:
        return self._nodes.get(node.node_id) is node

    def __len__(self) -> int:
        """Nodes in the forest, roots not counted."""
        return len(self._nodes)

    # -- prefixes -----------------------------------------------------------------------------

    def match(self, root: Node, tokens: Tokens, limit: int | None = None) -> Match:
        """The longest known prefix of the first `limit` tokens, in whole pages.

        Nodes count in whatever tier they are, and even if none holds them (below a hole left by
        an eviction): look at their states. The path is touched; a node in which the prefix ends
        is split there. `tokens` is not retained.
        """
        path, n_tokens = self._descend(root, tokens, whole_pages(tokens, self.page_size, limit))
        for node in path:
            node.hits += 1
        return Match(root, tuple(path), n_tokens)

    def prefix_length(self, root: Node, tokens: Tokens, limit: int | None = None) -> int:
        """Like `match`, in tokens, but nothing is touched or split."""
        end = whole_pages(tokens, self.page_size, limit)
        found = descend(root, tokens, end, self.page_size)
        return found.position + found.common

    def insert(
        self,
        root: Node,
        tokens: Tokens,
        slots: Sliceable,
        *,
        tier: Tier = Tier.DEVICE,
        limit: int | None = None,
    ) -> InsertResult:
        """Record that the whole pages of `tokens[:limit]` are RESIDENT in `tier`, in `slots`.

        `len(slots)` is a multiple of the number of those pages (one slot per page, or per token).
        Leading nodes that have slots in `tier` keep theirs; the rest adopts slices of `slots`.
        Raises IntegrityError, with nothing adopted, if a node has slots below one that lacks them.
        """
        end = whole_pages(tokens, self.page_size, limit)
        unit = _slots_per_page(slots, end // self.page_size, self.page_size)
        self._require_room(root, tier, slots)
        path, position = self._descend(root, tokens, end)
        first_absent = _count_present(path, tier)
        adopted = path[first_absent:]
        resident_tokens = position - sum(len(node.tokens) for node in adopted)
        begin = resident_tokens
        for node in adopted:
            stop = begin + len(node.tokens)
            self._settle(node, tier, _RESIDENT, _cut(slots, begin, stop, unit, self.page_size))
            begin = stop
        last = path[-1] if path else root
        if position < end:
            last = self._add_node(last, tokens[position:end])
            self._settle(last, tier, _RESIDENT, _cut(slots, position, end, unit, self.page_size))
            adopted.append(last)
        return InsertResult(resident_tokens, last, tuple(adopted))

    def extend(
        self,
        parent: Node,
        tokens: Tokens,
        tier: Tier,
        state: Residency,
        slots: Sliceable | None,
        op: int,
    ) -> list[Node]:
        """Make the run `tokens` (whole pages) below `parent` be in `state` in `tier`, by `op`.

        For pages on their way from a tier that is found by hash: nodes are made as needed, nodes
        there already but ABSENT in `tier` take the state and their slice of `slots`. Returns the
        run's nodes, top down. Raises IntegrityError, with no state changed, if part of the run is
        not ABSENT in `tier`.
        """
        if not parent.is_root:
            self._require_known(parent)
        end = whole_pages(tokens, self.page_size, None)
        if end != len(tokens) or end == 0:
            raise IntegrityError(f"A run of {len(tokens)} tokens is not made of whole pages.")
        unit = _slots_per_page(slots, end // self.page_size, self.page_size)
        self._require_room(parent, tier, slots)
        _require_in_transfer(state)
        path, position = self._descend(parent, tokens, end)
        for node in path:
            if node.records[tier].state is not _ABSENT:
                raise IntegrityError(
                    f"Node {node.node_id} is already {node.state(tier).name} in {tier.name}."
                )
        self._touch_ancestors(parent)
        if position < end:
            path.append(self._add_node(path[-1] if path else parent, tokens[position:end]))
        begin = 0
        for node in path:
            stop = begin + len(node.tokens)
            self._settle(node, tier, state, _cut(slots, begin, stop, unit, self.page_size))
            self._transfers.add(op, tier, node)
            begin = stop
        return path

    def split(self, node: Node, n_pages: int) -> tuple[Node, Node]:
        """Cut `node` after `n_pages` pages; returns (upper, lower).

        The lower half stays the same object, so whoever holds or pinned the node still has the
        whole path. The upper half inherits states, pins, transfers, recency and its slots.
        """
        self._require_known(node)
        if not 0 < n_pages < node.n_pages:
            raise IntegrityError(f"A node of {node.n_pages} pages has no cut after {n_pages}.")
        parent = node.parent
        assert parent is not None
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
        return upper, node

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

    # -- residency ----------------------------------------------------------------------------

    def set_resident(self, node: Node, tier: Tier, slots: Sliceable | None = None) -> None:
        """`node`, ABSENT in `tier` until now, is readable there, in `slots`."""
        self._require_known(node)
        _slots_per_page(slots, node.n_pages, self.page_size)
        parent = node.parent
        assert parent is not None
        self._require_room(parent, tier, slots)
        self._settle(node, tier, _RESIDENT, slots)

    def evict(self, node: Node, tier: Tier) -> Sliceable | None:
        """Take `node` out of `tier` and give its slots back; forgets nodes nothing needs now.

        Raises IntegrityError, with nothing changed, if the node is not RESIDENT there, is pinned
        there, or (DEVICE, HOST) if a child of it is present there.
        """
        self._require_known(node)
        record = node.records[tier]
        if record.state is not _RESIDENT:
            raise IntegrityError(
                f"Node {node.node_id} is {record.state.name} in {tier.name}; only RESIDENT ones go."
            )
        if record.pins:
            raise IntegrityError(
                f"Node {node.node_id} has {record.pins} pins in {tier.name}; unpin it first."
            )
        if tier <= Tier.HOST and record.children_present:
            raise IntegrityError(
                f"Node {node.node_id} has children in {tier.name}; evict those first."
            )
        slots = record.slots
        self._ledgers[tier].change_state(node, _ABSENT)
        record.slots = None
        self._prune(node)
        return slots

    # -- transfers ----------------------------------------------------------------------------

    def start_transfer(
        self, node: Node, tier: Tier, state: Residency, slots: Sliceable | None, op: int
    ) -> None:
        """`node`, ABSENT in `tier`, is LOADING or WRITING_BACK there, into `slots`, by `op`.

        One transfer may move many nodes. If a node is split under way both halves carry the id.
        """
        self._require_known(node)
        _slots_per_page(slots, node.n_pages, self.page_size)
        parent = node.parent
        assert parent is not None
        self._require_room(parent, tier, slots)
        _require_in_transfer(state)
        self._settle(node, tier, state, slots)
        self._transfers.add(op, tier, node)

    def finish_transfer(self, op: int, tier: Tier) -> list[Node]:
        """All nodes that `op` moves into `tier` are RESIDENT now; returns them, top down.

        Empty for an unknown `op`: `clear` may have dropped its nodes.
        """
        nodes = self._transfers.take(op, tier)
        for node in nodes:
            self._ledgers[tier].change_state(node, _RESIDENT)
        for node in reversed(nodes):
            self._prune(node)
        return nodes

    def abort_transfer(self, op: int, tier: Tier) -> list[tuple[Node, Sliceable | None]]:
        """Transfer `op` into `tier` failed: its nodes are ABSENT there; gives their slots back.

        Raises IntegrityError, with nothing changed, if a node outside the transfer is present in
        DEVICE below one of its nodes: that KV was computed from bytes that never came.
        """
        nodes = self._transfers.nodes(op, tier)
        if tier is Tier.DEVICE:
            self._require_no_dependents(nodes, op)
        self._transfers.take(op, tier)
        freed = []
        for node in reversed(nodes):
            record = node.records[tier]
            freed.append((node, record.slots))
            self._ledgers[tier].change_state(node, _ABSENT)
            record.slots = None
        for node in reversed(nodes):
            self._prune(node)
        freed.reverse()
        return freed

    def nodes_of(self, op: int) -> list[Node]:
        """Nodes that transfer `op` moves, into whichever tier, top down and each once."""
        nodes: dict[Node, None] = {}
        for tier in self._transfers.tiers(op):
            nodes.update(dict.fromkeys(self._transfers.nodes(op, tier)))
        return list(nodes)

    # -- pins and totals ----------------------------------------------------------------------

    def pin(self, node: Node, tier: Tier) -> None:
        """Forbid evicting `node` and its ancestors from `tier`; a root takes no pins."""
        if node.root_hash is None:
            self._require_known(node)
            self._ledgers[tier].pin(node)

    def unpin(self, node: Node, tier: Tier) -> None:
        """Take back one `pin`. A node that `clear` dropped has no pins left: nothing to do."""
        if node.root_hash is not None or node not in self:
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

    # -- internals ----------------------------------------------------------------------------

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

    def _new_node(self, parent: Node, tokens: Tokens, hashes: list[bytes]) -> Node:
        start = parent.end
        self._n_ids += 1
        node = Node(self._n_ids, parent, tokens, hashes, start + len(tokens), self._n_records)
        self._nodes[node.node_id] = node
        return node

    def _add_node(self, parent: Node, tokens: Tokens) -> Node:
        """A new node of `tokens`, which it owns from now on."""
        hashes = page_hashes(parent.last_page_hash, tokens, self.page_size)
        node = self._new_node(parent, tokens, hashes)
        node.last_access = self._clock.now()
        parent.children[self._key(node)] = node
        return node

    def _key(self, node: Node) -> bytes:
        return node.tokens[: self.page_size].tobytes()

    def _split_record(self, upper: Node, lower: Node, tier: Tier, n_pages: int) -> None:
        above, below = upper.records[tier], lower.records[tier]
        above.state, above.pins = below.state, below.pins
        above.children_present = int(below.state is not _ABSENT)
        slots = below.slots
        if slots is not None:
            cut = n_pages * (len(slots) // lower.n_pages)
            above.slots, below.slots = slots[:cut], slots[cut:]
        if below.op is not None:
            self._transfers.add(below.op, tier, upper)

    def _settle(self, node: Node, tier: Tier, state: Residency, slots: Sliceable | None) -> None:
        """`node`, ABSENT in `tier`, gets `slots` there."""
        self._ledgers[tier].change_state(node, state)
        node.records[tier].slots = slots

    def _require_known(self, node: Node) -> None:
        if node not in self:
            raise IntegrityError(f"{node!r} is not in the forest.")

    def _require_room(self, parent: Node, tier: Tier, slots: Sliceable | None) -> None:
        """Raise IntegrityError unless a child of `parent` may come to `tier`, into `slots`."""
        if tier is Tier.DEVICE and not parent.is_root and parent.state(tier) is _ABSENT:
            raise IntegrityError(
                f"Node {parent.node_id} is ABSENT in DEVICE, so nothing below it may be there."
            )
        if tier > Tier.HOST and slots is not None:
            raise IntegrityError(f"{tier.name} is addressed by content and takes no slots.")

    def _require_no_dependents(self, nodes: list[Node], op: int) -> None:
        for node in nodes:
            for child in node.children.values():
                record = child.records[Tier.DEVICE]
                if record.state is not _ABSENT and record.op != op:
                    raise IntegrityError(
                        f"Transfer {op} can't be aborted: node {child.node_id} builds on its bytes."
                    )

    def _prune(self, node: Node) -> None:
        """Forget `node`, then its ancestors, as long as nothing needs them."""
        while not node.is_root and not node.children and self._is_unneeded(node):
            parent = node.parent
            assert parent is not None
            for tier in self.tiers:
                if node.records[tier].state is not _ABSENT:
                    self._ledgers[tier].change_state(node, _ABSENT)
            del parent.children[self._key(node)]
            del self._nodes[node.node_id]
            node.parent = None
            node = parent

    def _is_unneeded(self, node: Node) -> bool:
        for tier in self.tiers:
            record = node.records[tier]
            if record.pins or record.op is not None:
                return False
            if tier <= Tier.HOST and record.state is not _ABSENT:
                return False
        return True


def _count_present(path: list[Node], tier: Tier) -> int:
    """How many leading nodes have slots in `tier`; raises IntegrityError if a later one has."""
    n_present = 0
    for index, node in enumerate(path):
        if node.records[tier].state is not _ABSENT:
            if n_present < index:
                raise IntegrityError(
                    f"Node {node.node_id} is in {tier.name} below a node that is not."
                )
            n_present += 1
    return n_present


def _require_in_transfer(state: Residency) -> None:
    if state not in IN_TRANSFER:
        raise IntegrityError(f"A transfer starts LOADING or WRITING_BACK, not {state.name}.")


def _slots_per_page(slots: Sliceable | None, n_pages: int, page_size: int) -> int:
    """1 or `page_size`; raises IntegrityError if `slots` cover `n_pages` in neither way."""
    if slots is None or (n_pages == 0 and len(slots) == 0):
        return 0
    if len(slots) not in (n_pages, n_pages * page_size):
        raise IntegrityError(
            f"{len(slots)} slots cover {n_pages} pages of {page_size} tokens neither by page nor "
            "by token."
        )
    return len(slots) // n_pages if n_pages else 0


def _cut(
    slots: Sliceable | None, begin: int, end: int, unit: int, page_size: int
) -> Sliceable | None:
    """The slots of tokens `begin` to `end`, both at page boundaries."""
    if slots is None:
        return None
    return slots[begin // page_size * unit : end // page_size * unit]
