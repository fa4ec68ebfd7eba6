"""Checks that everything the forest keeps incrementally equals what it should be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from tiered_kv.core.errors import IntegrityError
from tiered_kv.core.ids import Tier
from tiered_kv.forest.key import page_hashes
from tiered_kv.forest.ledger import TierLedger
from tiered_kv.forest.node import Node
from tiered_kv.forest.residency import IN_TRANSFER, Residency
from tiered_kv.forest.transfer import TransferIndex


def check(
    page_size: int,
    tiers: Sequence[Tier],
    roots: Iterable[Node],
    nodes: Mapping[int, Node],
    ledgers: Mapping[Tier, TierLedger],
    transfers: TransferIndex,
) -> None:
    """Raise IntegrityError, with a sentence, at the first thing that is not as it should be."""
    reached = _reachable(roots)
    if reached != set(nodes.values()):
        raise IntegrityError(
            f"{len(nodes)} nodes are known but {len(reached)} hang below roots, "
            f"{len(reached & set(nodes.values()))} of them the same."
        )
    for node_id, node in nodes.items():
        _require(node.node_id == node_id, node, f"is filed under {node_id}")
        _check_shape(node, page_size)
        for tier in tiers:
            _check_record(node, tier)
        _check_needed(node, tiers)
    for tier in tiers:
        _check_ledger(ledgers[tier], nodes.values())
    _check_transfers(tiers, nodes.values(), transfers)


def check_hashes(page_size: int, nodes: Iterable[Node]) -> None:
    """Recompute every page hash; raises IntegrityError at the first that differs."""
    for node in nodes:
        assert node.parent is not None
        expected = page_hashes(node.parent.last_page_hash, node.tokens, page_size)
        _require(node.page_hashes == expected, node, "has a page hash that is not its chain's")


def _require(condition: bool, node: Node, sentence: str) -> None:
    if not condition:
        raise IntegrityError(f"{node!r} {sentence}.")


def _reachable(roots: Iterable[Node]) -> set[Node]:
    reached: set[Node] = set()
    pending = list(roots)
    for root in pending:
        _require(root.is_root and root.parent is None, root, "is not a root")
    while pending:
        node = pending.pop()
        for child in node.children.values():
            _require(child not in reached, child, "hangs in two places")
            _require(child.parent is node, child, "does not know its parent")
            reached.add(child)
            pending.append(child)
    return reached


def _check_shape(node: Node, page_size: int) -> None:
    parent = node.parent
    assert parent is not None, "_reachable has seen it below a parent"
    _require(not node.is_root, node, "is a root below another node")
    _require(len(node.tokens) > 0, node, "has no tokens")
    _require(
        len(node.tokens) == len(node.page_hashes) * page_size,
        node,
        f"has {len(node.tokens)} tokens but {len(node.page_hashes)} page hashes",
    )
    _require(node.end == parent.end + len(node.tokens), node, "ends where it should not")
    key = node.tokens[:page_size].tobytes()
    _require(parent.children.get(key) is node, node, "is filed under another page")


def _check_record(node: Node, tier: Tier) -> None:
    record = node.records[tier]
    children = [child.records[tier] for child in node.children.values()]
    where = f"in {tier.name}"
    absent = record.state is Residency.ABSENT
    _require(not absent or record.slots is None, node, f"is ABSENT but has slots {where}")
    _require(
        record.slots is None or len(record.slots) in (node.n_pages, node.n_tokens),
        node,
        f"has slots for another number of pages {where}",
    )
    _require(
        record.slots is None or tier <= Tier.HOST,
        node,
        f"has slots {where}, which has none to give",
    )
    _require(
        (record.op is not None) == (record.state in IN_TRANSFER),
        node,
        f"is {record.state.name} with transfer {record.op} {where}",
    )
    present = sum(child.state is not Residency.ABSENT for child in children)
    _require(
        record.children_present == present,
        node,
        f"counts {record.children_present} children {where} but has {present}",
    )
    _require(
        tier is not Tier.DEVICE or not absent or present == 0,
        node,
        "is ABSENT in DEVICE above a child that is not",
    )
    pinned = sum(child.pins for child in children)
    _require(record.pins >= pinned, node, f"has {record.pins} pins {where}, its children {pinned}")


def _check_needed(node: Node, tiers: Sequence[Tier]) -> None:
    needed = bool(node.children) or any(
        record.pins > 0
        or record.op is not None
        or (tier <= Tier.HOST and record.state is not Residency.ABSENT)
        for tier, record in ((tier, node.records[tier]) for tier in tiers)
    )
    _require(needed, node, "is kept although nothing needs it")


def _check_ledger(ledger: TierLedger, nodes: Iterable[Node]) -> None:
    tier = ledger.tier
    evictable = protected = resident = 0
    leaves = set()
    for node in nodes:
        record = node.records[tier]
        if record.state is Residency.RESIDENT:
            resident += node.n_tokens
            if record.pins == 0 and record.children_present == 0:
                leaves.add(node)
        if record.state is Residency.RESIDENT and record.pins == 0:
            evictable += node.n_tokens
        elif record.state is not Residency.ABSENT:
            protected += node.n_tokens
    for name, kept, counted in (
        ("evictable", ledger.evictable_tokens, evictable),
        ("protected", ledger.protected_tokens, protected),
        ("resident", ledger.resident_tokens, resident),
    ):
        if kept != counted:
            raise IntegrityError(f"{tier.name} has {counted} {name} tokens, but {kept} are booked.")
    if set(ledger.leaves) != leaves:
        raise IntegrityError(
            f"{tier.name} has {len(leaves)} evictable leaves, but others are booked."
        )


def _check_transfers(
    tiers: Sequence[Tier], nodes: Iterable[Node], transfers: TransferIndex
) -> None:
    carried = {
        (op, tier, node)
        for node in nodes
        for tier in tiers
        if (op := node.records[tier].op) is not None
    }
    if carried != set(transfers.items()):
        raise IntegrityError(
            f"{len(carried)} nodes are in transfer, but the index of transfers names others."
        )
