"""check_integrity finds what it says it checks: each kind of damage, done on purpose, is reported.

A checker that passes everything would make every other test of the forest meaningless.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable

import pytest

from tiered_kv.core.errors import IntegrityError
from tiered_kv.core.ids import Tier
from tiered_kv.forest.forest import Forest
from tiered_kv.forest.key import namespace_hash
from tiered_kv.forest.node import Node
from tiered_kv.forest.residency import Residency

DEVICE, HOST, DISK = Tier.DEVICE, Tier.HOST, Tier.DISK


def grown() -> tuple[Forest, Node, Node, Node]:
    """A forest with one node above two, in several states, pinned and in transfer."""
    forest = Forest(4)
    root = forest.root(namespace_hash("model"))
    tokens = array("q", range(16))
    lower = forest.insert(root, tokens, list(range(16))).last
    other = forest.insert(root, tokens[:8] + array("q", range(90, 94)), list(range(12))).last
    upper = lower.parent
    assert upper is not None
    forest.set_resident(upper, HOST, [0, 1])
    forest.start_transfer(lower, HOST, Residency.WRITING_BACK, [2, 3], op=1)
    forest.set_resident(other, DISK)
    forest.pin(lower, DEVICE)
    return forest, upper, lower, other


Damage = Callable[[Forest, Node, Node, Node], object]


def set_record(tier: Tier, **values: object) -> Damage:
    def damage(forest: Forest, upper: Node, lower: Node, other: Node) -> None:
        for name, value in values.items():
            setattr(lower.records[tier], name, value)

    return damage


def set_ledger(name: str) -> Damage:
    def damage(forest: Forest, upper: Node, lower: Node, other: Node) -> None:
        ledger = forest._ledgers[DEVICE]
        setattr(ledger, name, getattr(ledger, name) + 4)

    return damage


def hole(forest: Forest, upper: Node, lower: Node, other: Node) -> None:
    forest._ledgers[DEVICE].unpin(lower)
    forest._ledgers[DEVICE].change_state(upper, Residency.ABSENT)
    upper.records[DEVICE].slots = None


def unneeded(forest: Forest, upper: Node, lower: Node, other: Node) -> None:
    forest._ledgers[DEVICE].change_state(other, Residency.ABSENT)
    other.records[DEVICE].slots = None


def orphan(forest: Forest, upper: Node, lower: Node, other: Node) -> None:
    upper.children.pop(other.tokens[:4].tobytes())


def wrong_key(forest: Forest, upper: Node, lower: Node, other: Node) -> None:
    upper.children[b"key"] = upper.children.pop(other.tokens[:4].tobytes())


DAMAGES: dict[str, tuple[Damage, str]] = {
    "child not linked": (orphan, "nodes are known"),
    "unknown node": (lambda f, u, lo, o: f._nodes.pop(o.node_id), "nodes are known"),
    "wrong id": (lambda f, u, lo, o: setattr(o, "node_id", 99), "filed under"),
    "wrong parent": (lambda f, u, lo, o: setattr(o, "parent", lo), "does not know its parent"),
    "child twice": (lambda f, u, lo, o: u.children.update(x=o), "two places"),
    "wrong key": (wrong_key, "another page"),
    "token lost": (lambda f, u, lo, o: o.tokens.pop(), "page hashes"),
    "hash lost": (lambda f, u, lo, o: o.page_hashes.pop(), "page hashes"),
    "wrong end": (lambda f, u, lo, o: setattr(lo, "end", 20), "ends where"),
    "absent with slots": (set_record(DEVICE, state=Residency.ABSENT), "ABSENT but has slots"),
    "slots of another length": (set_record(DEVICE, slots=[0]), "another number"),
    "disk slots": (set_record(DISK, state=Residency.RESIDENT, slots=[0, 1]), "none"),
    "transfer without id": (set_record(HOST, op=None), "WRITING_BACK with transfer None"),
    "id without transfer": (set_record(DEVICE, op=4), "RESIDENT with transfer 4"),
    "unknown transfer": (set_record(HOST, op=5), "index of transfers"),
    "children miscounted": (set_record(DEVICE, children_present=1), "counts 1 children"),
    "pins above too few": (set_record(DEVICE, pins=2), "has 1 pins"),
    "hole on the device": (hole, "above a child"),
    "kept for nothing": (unneeded, "nothing needs it"),
    "evictable miscounted": (set_ledger("evictable_tokens"), "evictable"),
    "protected miscounted": (set_ledger("protected_tokens"), "protected"),
    "resident miscounted": (set_ledger("resident_tokens"), "resident"),
    "leaf forgotten": (lambda f, u, lo, o: f._ledgers[DEVICE]._leaves.clear(), "leaves"),
    "leaf that is none": (lambda f, u, lo, o: f._ledgers[DEVICE]._add_leaf(u), "leaves"),
    "root with a parent": (lambda f, u, lo, o: setattr(u.parent, "parent", u), "not a root"),
}


def test_an_undamaged_forest_passes() -> None:
    grown()[0].check_integrity(deep=True)


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found(name: str) -> None:
    damage, sentence = DAMAGES[name]
    forest, *nodes = grown()
    damage(forest, *nodes)
    with pytest.raises(IntegrityError, match=sentence):
        forest.check_integrity()


def test_only_a_deep_check_recomputes_hashes() -> None:
    forest, _, lower, _ = grown()
    lower.page_hashes[0] = bytes(32)
    forest.check_integrity()
    with pytest.raises(IntegrityError, match="page hash"):
        forest.check_integrity(deep=True)


def test_views_are_frozen_and_readable() -> None:
    forest, upper, lower, other = grown()
    view = forest.view()
    by_id = {node.node_id: node for node in view.nodes}
    assert by_id[lower.node_id].parent_id == upper.node_id
    assert by_id[upper.node_id].parent_id < 0
    assert by_id[lower.node_id].states == (
        Residency.RESIDENT,
        Residency.WRITING_BACK,
        Residency.ABSENT,
    )
    assert by_id[lower.node_id].pins == (1, 0, 0)
    text = str(view)
    assert "WRITING_BACK" in text
    assert "8:16" in text
    forest.evict(other, DEVICE)
    assert forest.view() != view
    assert len(view.nodes) == 3
