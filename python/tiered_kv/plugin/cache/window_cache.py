"""The prefix cache of models some of whose layers look back a window only.

On the device those layers have rows for all tokens, in one pool with the others. The host and the
disk keep of them the last window before the places where prompts were cut, parted or ended
(`tiers/windows.py`), so that a prompt goes on from such places only, unless the device has it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang.srt.mem_cache.base_prefix_cache import (
    EvictParams,
    EvictResult,
    InsertParams,
    InsertResult,
)

from tiered_kv.memory.ticket import path_up
from tiered_kv.plugin.cache.placed_cache import PlacedPrefixCache
from tiered_kv.tiers.progress import SETTLE_TIMEOUT_S
from tiered_kv.tiers.windows import WindowPages

if TYPE_CHECKING:
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams

    from tiered_kv.plugin.cache.parts import CacheParts


class WindowPrefixCache(PlacedPrefixCache):
    """windows: the KV of layers with a window."""

    def __init__(self, params: CacheInitParams, parts: CacheParts, windows: WindowPages) -> None:
        super().__init__(params, parts, windows)
        self.windows = windows
        self._own = 0
        """Where in what is inserted next the tokens begin that its request has computed."""

    def evict(self, params: EvictParams) -> EvictResult:
        if params.num_tokens > self.evictable_size():
            # Copies are short, and hold what could be freed; running out of slots is fatal.
            self.windows.settle(SETTLE_TIMEOUT_S)
        return super().evict(params)

    def note_own(self, start: int) -> None:
        self._own = start

    def insert(self, params: InsertParams) -> InsertResult:
        result = super().insert(params)
        last, slots = self.last_inserted, params.value
        if last.is_root:
            return result
        assert slots is not None
        path = list(path_up(last))[::-1]
        self.windows.inserted(path, slots, self._own, result.prefix_len)
        is_lasting = self.is_lasting(last)
        # Others will part from it where it parted from what was known.
        parting = next((node for node in path if node.end == result.prefix_len), None)
        if parting is not None and parting is not last:
            self.windows.take(parting, is_lasting=is_lasting)
        self.windows.take(last, is_lasting=is_lasting)
        return result
