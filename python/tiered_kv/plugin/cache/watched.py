"""What the cache keeps for snapshots while it works, where they may be asked for."""

from __future__ import annotations

import time
from typing import Any

from tiered_kv.forest.forest import Forest
from tiered_kv.forest.largest import LargestPrefixes
from tiered_kv.plugin.requests.view import store_tokens
from tiered_kv.snapshot.tick_times import TickTimes


class Watched:
    """Attached to an empty forest, on the rank that answers."""

    def __init__(self, forest: Forest) -> None:
        self.sizes = LargestPrefixes(forest)
        self.ticks = TickTimes()
        names = ("requests", "prompt_tokens", "device", "host", "disk", "store")
        self.hits = dict.fromkeys(names, 0)
        """Of finished requests: how many, and prompt tokens in all and by where they came from."""
        self.shown: frozenset[int] = frozenset()
        """The prefixes of the last snapshot, by id."""
        self._forest = forest

    def polled(self) -> None:
        """A scheduling pass begins."""
        self.ticks.note(self._forest.now, time.perf_counter())

    def finished(self, req: Any) -> None:
        """`req` has its answer."""
        hits = self.hits
        hits["requests"] += 1
        hits["prompt_tokens"] += len(req.origin_input_ids)
        hits["device"] += req.cached_tokens_device
        hits["host"] += req.cached_tokens_host
        hits["disk"] += req.cached_tokens_storage - store_tokens(req)
        hits["store"] += store_tokens(req)
