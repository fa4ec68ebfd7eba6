"""The largest prefixes of a forest as rows of plain values, with what the others are in all.

The scheduler's thread makes these while nothing else runs, so it only copies: names, units and
differences are made where they are shown (`schema.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from tiered_kv.forest.forest import Forest
from tiered_kv.forest.inputs import token_ids
from tiered_kv.forest.largest import LargestPrefixes
from tiered_kv.forest.node import Node
from tiered_kv.memory.demand import Expectation
from tiered_kv.snapshot.tick_times import TickTimes

#: Most prefixes of one snapshot.
PREFIXES_MAX = 96

#: One prefix: id, id of its parent (negative: a tree), tokens, tokens to its end, tokens with all
#: below it, matches, seconds since its last use, seconds until its next one or None, pins on the
#: device, the head of its last page's hash, the state in each tier, first token ids.
Row = tuple[Any, ...]

NAME_BYTES = 8


def prefix_rows(
    nodes: Iterable[Node],
    sizes: LargestPrefixes,
    ticks: TickTimes,
    now_s: float,
    *,
    next_use: Mapping[int, Expectation],
    text_tokens: int = 0,
) -> list[Row]:
    """A row for each of `nodes`, in their order.

    Nodes are cold when a snapshot comes by, so each object that is looked at costs.

    now_s: on the clock of `ticks`. next_use: what is expected, by node id. text_tokens: how many of
    its first token ids each row has; 0: none.
    """
    rows: list[Row] = []
    sizes_by_id = sizes.sizes
    # Many were used at the same tick.
    ages_s: dict[int, float] = {}
    for node in nodes:
        parent = node.parent
        assert parent is not None, "a node in the forest has a parent"
        node_id, end, used = node.node_id, node.end, node.last_access
        age_s = ages_s.get(used)
        if age_s is None:
            age_s = ages_s[used] = ticks.age_s(used, now_s)
        expected = next_use.get(node_id)
        records = node.records
        rows.append(
            (
                node_id,
                parent.node_id,
                end - parent.end,
                end,
                sizes_by_id[node_id],
                node.hits,
                age_s,
                None if expected is None else expected.starts_in_s,
                records[0].pins,
                node.page_hashes[-1][:NAME_BYTES],
                [record.state._value_ for record in records],
                token_ids(node.tokens[:text_tokens]) if text_tokens else (),
            )
        )
    return rows


def tree_rows(nodes: Iterable[Node], sizes: LargestPrefixes) -> list[tuple[Any, ...]]:
    """The trees that `nodes` are in: id, head of its hash, tokens, whether salted, whether adapted.

    nodes: each behind its parent.
    """
    roots = {parent: None for node in nodes if (parent := node.parent) is not None}
    return [
        (
            root.node_id,
            root.last_page_hash[:NAME_BYTES],
            sizes.sizes[root.node_id],
            root.tree_key.salt is not None or root.tree_key.extra_key is not None,
            root.tree_key.adapter is not None,
        )
        for root in roots
        if root.is_root
    ]


def totals(forest: Forest, sizes: LargestPrefixes) -> dict[str, Any]:
    """Of all prefixes, shown or not: exact, and O(1)."""
    return {
        "count": len(forest),
        "tokens": sizes.tokens,
        "resident": [(int(tier), forest.resident_tokens(tier)) for tier in forest.tiers],
        "pinned": [(int(tier), forest.protected_tokens(tier)) for tier in forest.tiers],
    }


def place_on(path: Sequence[Node], shown: Collection[int]) -> int | None:
    """The last id of `shown` on `path`, top down: who is shown, is so with all above it."""
    place = None
    for node in path:
        if node.node_id not in shown:
            break
        place = node.node_id
    return place


def place_of(last: Node | None, shown: Collection[int], steps_max: int) -> int | None:
    """The deepest id of `shown` on the path up from `last`; None if that is far away."""
    node = last
    for _ in range(steps_max):
        if node is None or node.is_root:
            return None
        if node.node_id in shown:
            return node.node_id
        node = node.parent
    return None
