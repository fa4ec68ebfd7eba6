"""The radix forest: prefixes, where they live, and who needs them.

One tree per namespace; a node is a run of whole pages. The forest holds opaque slots and decides
nothing: callers say what was computed, moved, read or evicted, and the forest refuses, with an
IntegrityError, what would make its picture untrue. Not thread-safe: one thread owns it.

DEVICE residency is prefix-closed at all times: a node that is not ABSENT there has a parent that
is not ABSENT there either, since attention reads the whole prefix. Other tiers may have holes.
"""

from __future__ import annotations

from typing import TypeAlias

from tiered_kv.core.errors import IntegrityError
from tiered_kv.core.ids import Tier
from tiered_kv.forest.descent import whole_pages
from tiered_kv.forest.key import Sliceable
from tiered_kv.forest.node import Node, Tokens
from tiered_kv.forest.residency import IN_TRANSFER, Residency
from tiered_kv.forest.results import InsertResult, Match
from tiered_kv.forest.tree import Trees

_ABSENT = Residency.ABSENT
_RESIDENT = Residency.RESIDENT

Freed: TypeAlias = "list[tuple[Node, Sliceable | None]]"
"""Nodes that became ABSENT in a tier, top down, with the slots they had there."""


class Forest(Trees):
    """Trees of pages with per-tier residency, pins, transfers and totals."""

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

        `slots` has one element per page or one per token of those pages. Leading nodes that have
        slots in `tier` keep theirs; the rest adopts slices of `slots`. Raises IntegrityError, with
        nothing adopted, if a node has slots in `tier` below one that has none.
        """
        end = whole_pages(tokens, self.page_size, limit)
        unit = _slots_per_page(slots, end // self.page_size, self.page_size)
        self._require_room(root, tier, slots)
        path, position = self._descend(root, tokens, end)
        adopted = path[_count_present(path, tier) :]
        resident_tokens = position - sum(len(node.tokens) for node in adopted)
        last = path[-1] if path else root
        if position < end:
            last = self._add_node(last, tokens[position:end])
            adopted.append(last)
        for node in adopted:
            self._settle(node, tier, _RESIDENT, self._cut(slots, unit, 0, node))
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
            _require_absent(node, tier)
        self._touch_ancestors(parent)
        if position < end:
            path.append(self._add_node(path[-1] if path else parent, tokens[position:end]))
        for node in path:
            self._settle(node, tier, state, self._cut(slots, unit, parent.end, node))
            self._transfers.add(op, tier, node)
        return path

    # -- residency ----------------------------------------------------------------------------

    def set_resident(self, node: Node, tier: Tier, slots: Sliceable | None = None) -> None:
        """`node`, ABSENT in `tier` until now, is readable there, in `slots`."""
        self._require_known(node)
        _slots_per_page(slots, node.n_pages, self.page_size)
        self._require_room(node.parent, tier, slots)
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
        slots = self._vacate(node, tier)
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
        self._require_room(node.parent, tier, slots)
        _require_in_transfer(state)
        self._settle(node, tier, state, slots)
        self._transfers.add(op, tier, node)

    def let_go(self, last: Node) -> list[Node]:
        """Whoever used the path to `last` says that it will not: what no other prompt goes through
        was used longest ago from now on. Returns those nodes, from `last` up."""
        given_up: list[Node] = []
        node = last
        while node.parent is not None and len(node.children) <= bool(given_up):
            node.last_access = 0
            given_up.append(node)
            node = node.parent
        return given_up

    def mark_ahead(self, node: Node, tier: Tier) -> None:
        """`node`, present in `tier`, is there in expectation of a request; see `take_ahead`."""
        self._require_known(node)
        node.records[tier].ahead = True

    def take_ahead(self, last: Node, tier: Tier) -> int:
        """Tokens down to `last` that were brought to `tier` for whoever runs on them first.

        That is the caller: for the next one the same pages are ordinary cache.
        """
        n_tokens = 0
        node = last
        while (parent := node.parent) is not None:
            record = node.records[tier]
            if record.ahead:
                record.ahead = False
                n_tokens += len(node.tokens)
            node = parent
        return n_tokens

    def finish_transfer(self, op: int, tier: Tier) -> list[Node]:
        """All nodes that `op` moves into `tier` are RESIDENT now; returns them, top down.

        Empty for an unknown `op`: `clear` may have dropped its nodes.
        """
        return self._end_transfer(op, tier, self._transfers.nodes(op, tier), [])[0]

    def abort_transfer(self, op: int, tier: Tier) -> Freed:
        """Transfer `op` into `tier` failed: its nodes are ABSENT there; gives their slots back.

        Raises IntegrityError, with nothing changed, if a node outside the transfer is present in
        DEVICE below one of its nodes: that KV was computed from bytes that never came.
        """
        return self._end_transfer(op, tier, [], self._transfers.nodes(op, tier))[1]

    def finish_leading(self, op: int, tier: Tier, n_pages: int) -> tuple[list[Node], Freed]:
        """The first `n_pages` pages that `op` moves, top down, came; the rest did not.

        Like `finish_transfer` of the first and `abort_transfer` of the rest, for a transfer whose
        nodes lie on one path; a node in which the boundary falls is split.
        """
        came: list[Node] = []
        failed = self._transfers.nodes(op, tier)
        while failed and n_pages > 0:
            node = failed.pop(0)
            if node.n_pages > n_pages:
                node, rest = self.split(node, n_pages)
                failed.insert(0, rest)
            came.append(node)
            n_pages -= node.n_pages
        return self._end_transfer(op, tier, came, failed)

    def nodes_of(self, op: int) -> list[Node]:
        """Nodes that transfer `op` moves, into whichever tier, top down and each once."""
        nodes: dict[Node, None] = {}
        for tier in self._transfers.tiers(op):
            nodes.update(dict.fromkeys(self._transfers.nodes(op, tier)))
        return list(nodes)

    # -- internals ----------------------------------------------------------------------------

    def _settle(self, node: Node, tier: Tier, state: Residency, slots: Sliceable | None) -> None:
        """`node`, which must be ABSENT in `tier`, gets `slots` there."""
        _require_absent(node, tier)
        self._ledgers[tier].change_state(node, state)
        node.records[tier].slots = slots

    def _vacate(self, node: Node, tier: Tier) -> Sliceable | None:
        """`node` becomes ABSENT in `tier`; returns the slots it had."""
        record = node.records[tier]
        self._ledgers[tier].change_state(node, _ABSENT)
        record.ahead = False
        slots, record.slots = record.slots, None
        return slots

    def _end_transfer(
        self, op: int, tier: Tier, came: list[Node], failed: list[Node]
    ) -> tuple[list[Node], Freed]:
        """All nodes of `op`: those that `came` are RESIDENT, those that `failed` ABSENT."""
        if tier is Tier.DEVICE:
            _require_no_dependents(failed, op)
        self._transfers.drop(op, tier)
        for node in came:
            self._ledgers[tier].change_state(node, _RESIDENT)
        # Bottom up, so that no node goes before its children.
        freed = [(node, self._vacate(node, tier)) for node in reversed(failed)]
        freed.reverse()
        for node in reversed(came + failed):
            self._prune(node)
        return came, freed

    def _require_room(self, parent: Node | None, tier: Tier, slots: Sliceable | None) -> None:
        """Raise IntegrityError unless a child of `parent` may come to `tier`, into `slots`."""
        is_hole = parent is not None and not parent.is_root and parent.state(tier) is _ABSENT
        if tier is Tier.DEVICE and is_hole:
            raise IntegrityError(f"{parent!r} is not in DEVICE, so nothing below it may be there.")
        if tier > Tier.HOST and slots is not None:
            raise IntegrityError(f"{tier.name} is addressed by content and takes no slots.")

    def _cut(self, slots: Sliceable | None, unit: int, origin: int, node: Node) -> Sliceable | None:
        """The part of `slots` that is `node`'s; their first is that of token `origin`."""
        if slots is None:
            return None
        page_size = self.page_size
        begin, end = node.start - origin, node.end - origin
        return slots[begin // page_size * unit : end // page_size * unit]


def _require_no_dependents(nodes: list[Node], op: int) -> None:
    for node in nodes:
        for child in node.children.values():
            record = child.records[Tier.DEVICE]
            if record.state is not _ABSENT and record.op != op:
                raise IntegrityError(
                    f"Transfer {op} can't be aborted: node {child.node_id} builds on its bytes."
                )


def _require_absent(node: Node, tier: Tier) -> None:
    state = node.records[tier].state
    if state is not _ABSENT:
        raise IntegrityError(f"Node {node.node_id} is already {state.name} in {tier.name}.")


def _require_in_transfer(state: Residency) -> None:
    if state not in IN_TRANSFER:
        raise IntegrityError(f"A transfer starts LOADING or WRITING_BACK, not {state.name}.")


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


def _slots_per_page(slots: Sliceable | None, n_pages: int, page_size: int) -> int:
    """1 or `page_size`; raises IntegrityError if `slots` cover `n_pages` in neither way."""
    if slots is None:
        return 0
    n_slots = len(slots)
    if n_slots == n_pages:
        return 1
    if n_slots == n_pages * page_size:
        return page_size
    raise IntegrityError(
        f"{n_slots} slots cover {n_pages} pages of {page_size} tokens neither by page nor by token."
    )
