"""The requests that decode together, and when each of their tokens came."""

from __future__ import annotations

from array import array
from collections.abc import Collection

import numpy as np

from tiered_kv.simulation.cache import TieredCache
from tiered_kv.simulation.execution import FloatArray
from tiered_kv.simulation.live import LiveRequest
from tiered_kv.simulation.shared_prefixes import SharedPrefixes


class DecodeBatch:
    """Everyone in it who is not parked gets one token in every decode pass.

    So the times of passes are kept once, and a request knows the number of its first since it was
    last added or came back from being parked.
    """

    def __init__(self, cache: TieredCache, *, is_cascade: bool = False) -> None:
        """`is_cascade`: a prefix of several prompts is read once in each pass."""
        self._cache = cache
        self._shared = SharedPrefixes() if is_cascade else None
        self._requests: dict[int, LiveRequest] = {}
        self._parked: dict[int, LiveRequest] = {}
        self._pass_ends_s = array("d")
        self.context_tokens = 0
        """Sum of the contexts of those who decode."""
        self.parked_tokens = 0
        """Sum of the contexts of those who are parked."""

    def __len__(self) -> int:
        return len(self._requests) + len(self._parked)

    @property
    def requests(self) -> Collection[LiveRequest]:
        """Everyone, parked or not."""
        if not self._parked:
            return self._requests.values()
        return [*self._requests.values(), *self._parked.values()]

    @property
    def decoding(self) -> Collection[LiveRequest]:
        """Those who get a token in the next pass."""
        return self._requests.values()

    @property
    def n_decoding(self) -> int:
        return len(self._requests)

    @property
    def n_parked(self) -> int:
        return len(self._parked)

    @property
    def shared_tokens_saved(self) -> int:
        """Tokens of the contexts that a pass need not read, for `CostModel.iteration_s`."""
        return 0 if self._shared is None else self._shared.n_saved * self._cache.block_tokens

    def add(self, live: LiveRequest) -> None:
        """`live` decodes from the next pass on."""
        self._join(live)

    def remove(self, live: LiveRequest) -> None:
        """`live` is done, or goes back to the queue."""
        if self._parked.pop(live.queued.request_id, None) is None:
            self._leave(live)
        else:
            self.parked_tokens -= live.queued.prefilled_tokens

    def choose(self, request_ids: Collection[int] | None) -> None:
        """Those decode from the next pass on, the others are parked; None: everyone decodes."""
        chosen = None if request_ids is None else frozenset(request_ids)
        if chosen is None and not self._parked:
            return
        back = [live for rid, live in self._parked.items() if chosen is None or rid in chosen]
        for live in back:
            del self._parked[live.queued.request_id]
            self.parked_tokens -= live.queued.prefilled_tokens
            self._join(live)
        if chosen is None:
            return
        for live in [live for rid, live in self._requests.items() if rid not in chosen]:
            self._leave(live)
            self._parked[live.queued.request_id] = live
            self.parked_tokens += live.queued.prefilled_tokens

    def _join(self, live: LiveRequest) -> None:
        if self._shared is not None:
            self._shared.add(live.queued.tokens)
        live.first_step = len(self._pass_ends_s)
        self._requests[live.queued.request_id] = live
        self.context_tokens += live.queued.prefilled_tokens

    def _leave(self, live: LiveRequest) -> None:
        del self._requests[live.queued.request_id]
        if self._shared is not None:
            self._shared.remove(live.queued.tokens)
        self.context_tokens -= live.queued.prefilled_tokens
        live.token_times_s.append(self._pass_ends_s[live.first_step :])

    def passes_until_a_finish(self) -> int:
        """Passes after which the first of them has its last token."""
        return min(live.request.output_tokens - live.queued.output_tokens for live in self.decoding)

    def advance(self, ends_s: FloatArray) -> list[LiveRequest]:
        """Passes ended at `ends_s`: a token each for who decodes. Returns those that are done."""
        n_passes = len(ends_s)
        last_s = float(ends_s[-1])
        self._pass_ends_s.frombytes(ends_s.tobytes())
        done = []
        for live in self.decoding:
            queued = live.queued
            live.last_token_s = last_s
            queued.output_tokens += n_passes
            queued.prefilled_tokens += n_passes
            self._cache.take_private(live, n_passes)
            if queued.output_tokens >= live.request.output_tokens:
                done.append(live)
        self.context_tokens += n_passes * len(self._requests)
        return done

    def retraction_order(self) -> list[LiveRequest]:
        """Who goes back first: fewest output tokens, then longest prompt, as upstream."""
        return sorted(
            self.requests,
            key=lambda live: (live.queued.output_tokens, -live.queued.prompt_tokens),
        )


def record_gaps(live: LiveRequest) -> None:
    """Put the times between the tokens of finished `live` into its record."""
    record = live.record
    times = array("d")
    for part in live.token_times_s:
        times.extend(part)
    if len(times) < 2:
        return
    gaps = np.diff(np.frombuffer(times))
    record.mean_tbt_s = float(times[-1] - times[0]) / len(gaps)
    record.n_gaps = len(gaps)
    if record.tbt_slo_s is not None:
        record.n_late_gaps = int(np.count_nonzero(gaps > record.tbt_slo_s))
    gaps.sort()
    record.max_tbt_s = float(gaps[-1])
    # The nearest rank: a tail of whole gaps, not a value between two of them.
    record.p99_tbt_s = float(gaps[-(-99 * len(gaps) // 100) - 1])
