"""What the memory manager decides. Actions carry ids, never slots or bytes.

The caller carries them out, in order, and tells the forest.
"""

from __future__ import annotations

from dataclasses import dataclass

from tiered_kv.core.ids import Tier


@dataclass(frozen=True, slots=True)
class WriteBack:
    """Copy a node's pages to a farther tier; they stay readable in `source`."""

    node_id: int
    source: Tier
    target: Tier


@dataclass(frozen=True, slots=True)
class Load:
    """Copy the pages of consecutive nodes, top down, to a nearer tier."""

    node_ids: tuple[int, ...]
    source: Tier
    target: Tier


@dataclass(frozen=True, slots=True)
class Drop:
    """Free a node's slots in one tier; copies in other tiers stay."""

    node_id: int
    tier: Tier
