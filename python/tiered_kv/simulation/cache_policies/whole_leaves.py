"""Eviction as upstream's radix cache does it: a leaf goes as a whole, however little is needed.

The server's own manager splits the last victim and keeps its head. Where prompts are long against
the pool the difference is large: a page short costs a whole document.
"""

from __future__ import annotations

from tiered_kv.core.ids import Tier
from tiered_kv.memory.actions import Drop
from tiered_kv.memory.manager import MemoryManager


class WholeLeafManager(MemoryManager):
    """The memory manager, but for what it does to the last victim (radix_cache.py, `evict`)."""

    def on_pressure(self, tier: Tier, n_pages: int) -> list[Drop]:
        """Drops that free `n_pages` pages of `tier` or more; see `MemoryManager.on_pressure`."""
        return [Drop(node.node_id, tier) for node in self._eviction.victims(tier, n_pages)]
