"""Weights that change while the server runs: KV computed with others must not come back.

Before an update the disk tier is suspended, since what is computed afterwards has no name yet; the
flush that upstream does after an update (unless told not to) names the new weights and resumes it.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tiered_kv.plugin.cache.prefix_cache import TieredPrefixCache

_caches: weakref.WeakSet[TieredPrefixCache] = weakref.WeakSet()


def track(cache: TieredPrefixCache) -> None:
    _caches.add(cache)


def before_update(updater: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE SchedulerWeightUpdaterManager.update_weights_from_*."""
    for cache in _caches:
        cache.weights_changing()
