"""Prefetch with threads: lookups and reads that `memory.prefetch` asks for.

A lookup that misses costs one hash and one dictionary probe; a long prompt that hits is hashed and
looked up on a thread of its own.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence

from tiered_kv.core.ids import Tier
from tiered_kv.forest.node import Node
from tiered_kv.memory.prefetch import PrefetchPlanner
from tiered_kv.tiers.cold.lookup import ColdLookup, Lookups
from tiered_kv.tiers.cold.read_queue import ColdRead
from tiered_kv.tiers.cold.tier import ColdTier
from tiered_kv.tiers.context import TierContext
from tiered_kv.tiers.timeline import REQUESTS
from tiered_kv.tiers.transfer import Completion


class Prefetch(PrefetchPlanner):
    """colds: where to look, the nearest first."""

    def __init__(self, context: TierContext, colds: Sequence[ColdTier]) -> None:
        self._context = context
        self.lookups = Lookups(context, colds)
        self._began_s: dict[str, float] = {}
        """Of those that are still to be drawn."""
        n_pages = context.host.n_pages
        super().__init__(context.forest, context, self.lookups, colds, n_pages)

    def request(
        self, rid: str, anchor: Node, tokens: array[int], *, is_ahead: bool = False
    ) -> None:
        is_new = self._context.timeline is not None and rid not in self.tickets
        super().request(rid, anchor, tokens, is_ahead=is_ahead)
        if is_new and rid in self.tickets:
            self._began_s[rid] = time.perf_counter()

    def looked_up(self, completion: Completion[ColdLookup]) -> None:
        """A lookup is done: its request stands in line, unless it has gone."""
        job = completion.job
        if not self.is_asked(job.rid, job.tokens):
            return
        stored = self.lookups.answered(completion)
        if stored is not None:
            self.answered(job.rid, stored)

    def done(self, rid: str) -> bool:
        is_done = super().done(rid)
        if is_done and rid in self._began_s and self.tickets[rid].pinned is not None:
            self._draw(rid)
        return is_done

    def _draw(self, rid: str) -> None:
        began_s, now_s = self._began_s.pop(rid), time.perf_counter()
        if self._context.timeline is not None:
            tokens = self.tickets[rid].came_tokens
            self._context.timeline.span(REQUESTS, rid, began_s, now_s, tokens=tokens)

    def release(self, rid: str) -> None:
        self._began_s.pop(rid, None)
        super().release(rid)

    def finished(self, completion: Completion[ColdRead]) -> None:
        """A read is done, as far as it came."""
        context, job = self._context, completion.job
        if job.epoch.flushes != context.epoch.flushes:
            self.read_ended_behind_flush(job.op, completion.n_done)
            return
        is_cleared = job.epoch != context.epoch
        source = self.read_ended(job.op, completion.n_done, is_cleared=is_cleared)
        context.transferred(source, Tier.HOST, completion)
