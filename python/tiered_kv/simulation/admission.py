"""How a prefill batch is filled: the budgets of upstream's PrefillAdder (schedule_policy.py).

Two rules limit it: the tokens of one iteration (chunk size, max-prefill-tokens), and memory, of
which every running request has a part of its remaining output reserved.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, field

from tiered_kv.simulation.cache import TieredCache
from tiered_kv.simulation.live import LiveRequest
from tiered_kv.simulation.settings import InstanceSettings


class Added(enum.Enum):
    """What became of a request, as upstream's AddReqResult."""

    CONTINUE = enum.auto()
    """It is in the batch, and there is room for more."""
    LAST = enum.auto()
    """It is in the batch, and the batch is full."""
    NO_MEMORY = enum.auto()
    """Not in the batch: memory is short."""
    NO_BUDGET = enum.auto()
    """Not in the batch: the iteration's tokens are used up."""


@dataclass(slots=True)
class PrefillBatch:
    """Chunks of one iteration."""

    chunks: list[tuple[LiveRequest, int, int]] = field(default_factory=list)
    """(request, new tokens, tokens before them)."""
    unfinished: LiveRequest | None = None
    """The request whose prompt goes on in the next iteration."""
    is_mixed: bool = False
    """Whether the running requests decode in the same iteration."""
    ready_s: float = 0.0
    """When all prefixes that are being loaded have arrived."""


class NewTokenRatio:
    """Which part of its limit a request is expected to produce (new_token_ratio_tracker.py)."""

    RETRACT_DECODE_STEPS = 20

    def __init__(self, settings: InstanceSettings) -> None:
        self.current = settings.init_new_token_ratio
        self._least = self.current * settings.min_new_token_ratio_factor
        self._decay = (self.current - self._least) / settings.new_token_ratio_decay_steps

    def decay(self, n_steps: int) -> None:
        """`n_steps` decode steps passed without a retraction."""
        self.current = max(self._least, self.current - n_steps * self._decay)

    def after_retraction(self, kept: Iterable[LiveRequest]) -> None:
        """Estimate it anew from those that stay."""
        produced = limits = 0
        for live in kept:
            produced += live.queued.output_tokens + self.RETRACT_DECODE_STEPS
            limits += live.queued.max_new_tokens
        self.current = min(1.0, produced / (limits + 1))


class PrefillAdder:
    """Fills one batch."""

    def __init__(
        self,
        settings: InstanceSettings,
        cache: TieredCache,
        running: Iterable[LiveRequest],
        new_token_ratio: float,
        chunk_tokens: int,
        n_mixed_decodes: int,
    ) -> None:
        self.batch = PrefillBatch()
        self.missing_tokens = 0
        """What the last one that memory was short for lacked."""
        self._cache = cache
        self._page = settings.page_tokens
        self._clip = clip = settings.clip_max_new_tokens
        self._input_left = settings.max_prefill_tokens - n_mixed_decodes
        self._chunk_left = chunk_tokens - n_mixed_decodes
        reserved = 0
        for live in running:
            queued = live.queued
            reserved += min(queued.max_new_tokens - queued.output_tokens, clip)
        self._reserved = n_mixed_decodes + int(reserved * new_token_ratio)
        self._taken = n_mixed_decodes

    @property
    def _memory_left(self) -> int:
        return self._cache.available_tokens - self._reserved

    def add_unfinished(self, live: LiveRequest, at_most: int | None = None) -> None:
        """The next chunk of a prompt that was begun; it goes on whatever memory says.

        at_most: tokens, so that others fit beside it.
        """
        left = min(self._chunk_left, self._memory_left)
        if left <= 0:
            left = self._chunk_left
        self._add(live, left if at_most is None else min(left, at_most), 0.0)

    def add(self, live: LiveRequest) -> Added:
        """Admit `live` if memory and budget allow."""
        queued, cache = live.queued, self._cache
        kv_tokens = queued.prompt_tokens + queued.output_tokens
        max_new = min(max(queued.max_new_tokens - queued.output_tokens, 0), self._clip)
        # The prefix on the device is in use already or about to be pinned: only the rest is new.
        needed = kv_tokens - queued.device_tokens + max_new + self._page
        if needed >= self._memory_left:
            self.missing_tokens = needed - self._memory_left + 1
            return Added.NO_MEMORY
        prefix = cache.pin_prefix(live, kv_tokens - 1)
        # Pinning took evictable tokens away.
        new_tokens = kv_tokens - prefix.n_units * cache.block_tokens
        if new_tokens + max_new + self._page >= self._memory_left:
            self.missing_tokens = new_tokens + max_new + self._page - self._memory_left + 1
            cache.release(live)
            return Added.NO_MEMORY
        prefix = cache.load_back(live, prefix)
        queued.prefilled_tokens = cached = prefix.n_units * cache.block_tokens
        new_tokens = kv_tokens - cached
        is_second = self.batch.unfinished is not None  # the loop keeps track of one
        least_left = new_tokens if is_second else self._page
        if new_tokens > self._chunk_left and self._chunk_left < least_left:
            queued.prefilled_tokens = 0
            cache.release(live)
            return Added.NO_BUDGET
        cache.admitted(live)
        loaded = prefix.loaded_units * cache.block_tokens
        if live.record.admitted_s is None:
            loaded += cache.brought_ahead_tokens(live)
            from_below = min(loaded, live.prefetched_tokens)
            live.record.shared_hit_tokens = from_shared = min(from_below, live.shared_tokens)
            live.record.disk_hit_tokens = from_below - from_shared
            live.record.host_hit_tokens = loaded - from_below
            live.record.device_hit_tokens = cached - loaded
        left = self._chunk_left
        if new_tokens > left:
            left = left // self._page * self._page
        self._add(live, left, prefix.ready_s)
        return self._state()

    def _add(self, live: LiveRequest, limit: int, ready_s: float) -> None:
        queued = live.queued
        left = queued.unprefilled_tokens
        new = min(left, limit)
        batch = self.batch
        batch.chunks.append((live, new, queued.prefilled_tokens))
        batch.ready_s = max(batch.ready_s, ready_s)
        max_new = 0
        if new < left:
            batch.unfinished = live
        else:
            max_new = min(queued.max_new_tokens, self._clip)
        paged = -(-new // self._page) * self._page
        self._reserved += paged + max_new + self._page
        self._taken += paged + self._page
        self._input_left -= paged
        self._chunk_left -= paged

    def _state(self) -> Added:
        if self._memory_left <= 0 or self._cache.available_tokens <= self._taken:
            return Added.LAST
        if self._input_left <= 0 or self._chunk_left <= 0:
            return Added.LAST
        return Added.CONTINUE
