"""HiCache's rules for pages on disk (hiradix_cache.py): which are fetched, and for how long."""

from __future__ import annotations

import math

from tiered_kv.core.ids import Tier
from tiered_kv.memory.cold_source import ReadRules
from tiered_kv.simulation.settings import CacheSettings


class HiCacheRules:
    """Around the memory manager's, which say what is worth reading."""

    def __init__(self, rules: ReadRules, settings: CacheSettings, block_tokens: int) -> None:
        self._rules = rules
        self._settings = settings
        self._block_tokens = block_tokens

    def pages_from(
        self,
        source: Tier,
        n_pages: int,
        start: int,
        prompt_tokens: int,
        *,
        queued_bytes: int = 0,
        least_pages: int = 0,  # noqa: ARG002
    ) -> int:
        """See `MemoryManager.pages_from`. Nothing is read to find out how long it takes."""
        n_wanted = self._rules.pages_from(
            source, n_pages, start, prompt_tokens, queued_bytes=queued_bytes
        )
        is_short = n_wanted * self._block_tokens < self._settings.prefetch_threshold_tokens
        return 0 if is_short else n_wanted

    def read_s(self, source: Tier, n_pages: int, queued_bytes: int = 0) -> float:
        return self._rules.read_s(source, n_pages, queued_bytes)

    def patience_s(self, n_pages: int, start: int, read_s: float) -> float:  # noqa: ARG002
        """By the stop policy; below nothing for those who do not wait at all."""
        settings = self._settings
        if settings.stop_policy == "best_effort":
            return -1.0
        if settings.stop_policy == "wait_complete":
            return math.inf
        ki_tokens = n_pages * self._block_tokens / 1024
        timeout_s = settings.timeout_base_s + settings.timeout_per_1024_tokens_s * ki_tokens
        return min(settings.timeout_max_s, timeout_s)


def read_rules(rules: ReadRules, settings: CacheSettings, block_tokens: int) -> ReadRules:
    """The server's own, or HiCache's around them."""
    if settings.stop_policy == "patience":
        return rules
    return HiCacheRules(rules, settings, block_tokens)
