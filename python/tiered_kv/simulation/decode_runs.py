"""Decode passes in a row, simulated in one go, and cut short when something else may start."""

from __future__ import annotations

import bisect
from collections.abc import Callable

from tiered_kv.simulation.cache import TieredCache
from tiered_kv.simulation.decode_batch import DecodeBatch
from tiered_kv.simulation.decode_selection import DecodeSelection
from tiered_kv.simulation.events import EventQueue
from tiered_kv.simulation.execution import DecodeRun, Execution

#: Room for this many decode passes is made at a time when memory is short.
DECODE_STEPS_AHEAD = 32


class DecodeRuns:
    """At most one at a time. on_end: is told of each, with the time, when it is over."""

    def __init__(
        self,
        running: DecodeBatch,
        selection: DecodeSelection | None,
        cache: TieredCache,
        execution: Execution,
        events: EventQueue,
        on_end: Callable[[DecodeRun, float], None],
    ) -> None:
        self._running = running
        self._selection = selection
        self._cache = cache
        self._execution = execution
        self._events = events
        self._on_end = on_end
        self._run: DecodeRun | None = None

    def start(self, now_s: float, *, is_one_pass: bool) -> None:
        """As many passes as nothing known interrupts; is_one_pass: one of them."""
        n_steps_max = 0 if self._selection is None else self._selection.choose(now_s)
        n = self._running.n_decoding
        n_steps = 1 if is_one_pass else self._running.passes_until_a_finish()
        if n_steps_max:
            n_steps = min(n_steps, n_steps_max)
        elif self._selection is not None:
            n_steps = self._selection.passes_that_fit(n_steps)
        free = self._cache.free_tokens
        if free < n * n_steps:
            wanted = min(n_steps, DECODE_STEPS_AHEAD)
            self._cache.make_room(n * wanted)
            n_steps = max(1, min(n_steps, self._cache.free_tokens // n))
        ends_s = self._execution.decode_ends_s(
            now_s, self._running.context_tokens, n, n_steps, self._running.shared_tokens_saved
        )
        event = self._events.schedule(float(ends_s[-1]), self._end)
        self._run = DecodeRun(ends_s, now_s, event)

    def cut(self, now_s: float) -> None:
        """End the run, if there is one, after the pass that is under way."""
        run = self._run
        if run is None:
            return
        n_steps = bisect.bisect_left(run.ends_s, now_s) + 1
        if n_steps < len(run.ends_s):
            run.ends_s = run.ends_s[:n_steps]
            self._events.cancel(run.event)
            run.event = self._events.schedule(float(run.ends_s[-1]), self._end)

    def _end(self, now_s: float) -> None:
        run = self._run
        assert run is not None
        self._run = None
        self._on_end(run, now_s)
