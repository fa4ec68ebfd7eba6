"""What is worth a place in a store that servers share.

Everything computed goes to the local disk. A shared store is reached over a network, by all at
once: if each server wrote all it computed there, what nobody asks for again would drive out what
many do. So a page goes there when somebody has used it a second time, or when it ends a prefix that
takes long to compute, if reading it there is sooner than computing it at all.
"""

from __future__ import annotations

import enum

from tiered_kv.core.ids import Tier
from tiered_kv.forest.node import Node
from tiered_kv.memory.costs import Costs

#: A prefix that takes longer to compute than this is worth sharing at its first use.
LONG_S = 0.5


class StoreWrites(enum.Enum):
    """Which pages in host memory are written to a shared store."""

    VALUE = "value"
    """Those that `is_worth_sharing`."""

    ALL = "all"

    NONE = "none"


def is_worth_sharing(node: Node, store: Tier, costs: Costs | None, page_size: int) -> bool:
    """Whether `node`, and with it all above it, should be in a store for other servers.

    A match is a use: whoever computed a prefix inserts it, and matches what others did. costs:
    None if nothing is known of them; then only use counts.
    """
    if costs is None:
        return node.hits > 0
    n_bytes = int(page_size * costs.bytes_per_token(store))
    page_s = costs.recompute_s(max(node.end - page_size, 0), node.end)
    if costs.load_s(store, Tier.HOST, n_bytes) - costs.load_s(store, Tier.HOST, 1) >= page_s:
        return False
    return node.hits > 0 or costs.recompute_s(0, node.end) >= LONG_S
