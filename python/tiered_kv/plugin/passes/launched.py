"""From when to when each forward pass ran, whether or not launching it is running it."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

T = TypeVar("T")

#: Launched passes whose result is still to come; overlap has two at most.
LAUNCHED_MAX = 8


def chunks_of(batch: Any) -> tuple[tuple[tuple[int, int], ...], int, int]:
    """Of a pass that prefills: (new tokens, tokens before them) of each request that does; what
    those who decode in it attend to, together; and how many these are.
    """
    chunks = tuple(zip(batch.extend_lens, batch.prefix_lens, strict=True))
    # Decodes that are mixed in come last, as chunks of one token.
    n_decodes = len(batch.decoding_reqs) if batch.forward_mode.is_mixed() else 0
    n_prefills = len(chunks) - n_decodes
    context_tokens = sum(before + 1 for _, before in chunks[n_prefills:])
    return chunks[:n_prefills], context_tokens, n_decodes


class LaunchedPasses(ABC, Generic[T]):
    """Notes what a pass does when it is launched, since its batch changes, until it is over.

    synchronous: whether `run_batch` returns when the pass is over, as it does on a CPU. Elsewhere
    passes run one after the other on the device, and the result of one is handled when it is there:
    a pass took the time since its launch, or since the result before, whichever was later.
    """

    def __init__(self, *, synchronous: bool) -> None:
        self._synchronous = synchronous
        self._launched: dict[float, T] = {}
        self._last_result_at = 0.0

    @abstractmethod
    def describe(self, batch: Any) -> T | None:
        """What the pass over `batch` does; None if nobody wants to know."""

    @abstractmethod
    def over(self, described: T, start_s: float, end_s: float) -> None:
        """Such a pass ran from `start_s` to `end_s` (time.monotonic)."""

    def launched(self, batch: Any) -> None:
        described = self.describe(batch)
        if described is None:
            return
        if self._synchronous:
            self.over(described, batch.launch_ts, time.monotonic())
            return
        self._launched[batch.launch_ts] = described
        while len(self._launched) > LAUNCHED_MAX:
            del self._launched[next(iter(self._launched))]

    def finished(self, batch: Any) -> None:
        if self._synchronous:
            return
        now = time.monotonic()
        described = self._launched.pop(batch.launch_ts, None)
        if described is not None:
            self.over(described, max(batch.launch_ts, self._last_result_at), now)
        self._last_result_at = now
