"""SGLang 0.5.23's only prefix cache, `UnifiedRadixCache`, without pools: to be timed and compared.

Its tree is a core of its own, in Rust by default or in Python.
"""

from __future__ import annotations

from array import array
from typing import Any

CORES = ("rust", "python")


class NoPool:
    """In the place of the allocator: slots that are given back go nowhere."""

    device = "cpu"

    def free(self, slots: Any) -> None:
        """Nothing to do."""

    def free_segment(self, slots: Any, **where: Any) -> None:
        """Nothing to do."""


class UnifiedTree:
    """One such cache. Raises ImportError beside a release that lacks it."""

    def __init__(self, core: str, page_size: int, **policy: Any) -> None:
        """core: of `CORES`; policy: `eviction_policy` and `eviction_policy_config`."""
        from sglang.srt.mem_cache import base_prefix_cache
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.radix_cache import RadixKey
        from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
        from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

        params = CacheInitParams(
            False,
            None,
            NoPool(),
            page_size,
            tree_components=(ComponentType.FULL,),
            tree_core_backend=core,
            **policy,
        )
        self.cache = UnifiedRadixCache(params)
        if self.cache._tree_core_backend != core:
            raise ImportError(f"SGLang's tree in {core} cannot be loaded here")
        self._params = base_prefix_cache
        self._key = RadixKey

    def insert(self, tokens: array[int], slots: Any) -> Any:
        """All of `tokens`."""
        return self.cache.insert(self._params.InsertParams(key=self._key(tokens), value=slots))

    def match(self, tokens: array[int], limit: int | None = None) -> Any:
        """The longest prefix; how many tokens it has is `device_prefix_len`."""
        key = self._key(tokens, limit=limit)
        return self.cache.match_prefix(self._params.MatchPrefixParams(key=key))

    def slots(self, match: Any) -> Any:
        """Of all tokens that were found."""
        return self.cache.path_device_indices(match.last_device_node)

    def pin(self, match: Any) -> None:
        """Pins what was found, and unpins it."""
        self.cache.unlock(self.cache.lock(match.last_device_node))

    def evict(self, n_tokens: int) -> int:
        """At least so many tokens, by whole leaves; how many they were."""
        result = self.cache.evict(self._params.EvictParams(num_tokens=n_tokens))
        return int(result.num_tokens_evicted)
