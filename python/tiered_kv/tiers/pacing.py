"""Holds background copies to the rate of an interference budget, on the threads that copy.

What may not go yet waits where it is, in its queue, and goes in the order of the queue: nothing is
given up. The limit is off while nothing decodes, while somebody waits for the copies, while they
hold too much of a pool, and from the shutdown on.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tiered_kv.tiers.interference import InterferenceBudget

#: Bytes that are moved at a time under a budget: some of the largest blocks that DMA gains from.
PORTION_BYTES = 8 << 20
#: Decoding is over if no step has ended for so long, or for so many times the last step's time.
IDLE_S = 0.25
IDLE_STEPS = 4.0


#: Turns that are remembered until the next decode step ends; nobody asks for more.
TURNS_MAX = 1024


@dataclass(slots=True)
class _Turn:
    n_bytes: int
    start_s: float
    end_s: float = math.inf


class WriteBackPacer:
    """One for all queues that write back. Without a budget nothing is ever held up.

    clock: seconds, monotonic.
    """

    def __init__(
        self,
        budget: InterferenceBudget | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._budget = budget
        self._clock = clock
        self._changed = threading.Condition()
        self._decoding_until_s = -math.inf
        self._next_s = -math.inf
        self._n_hurrying = 0
        self._is_pressed = False
        self._turns: deque[_Turn] = deque()
        self._was_quiet = False

    @property
    def bytes_per_s(self) -> float:
        """The limit while requests decode; infinite if there is none."""
        return math.inf if self._budget is None else self._budget.bytes_per_s

    # -- the scheduler's thread ---------------------------------------------------------------

    @property
    def is_wanted(self) -> bool:
        """Whether decode steps are to be observed."""
        return self._budget is not None

    def observe_decode(self, seconds: float, expected_s: float) -> None:
        """A decode step has just ended that took `seconds`; see `InterferenceBudget`.

        What was moved between steps, under a prefill for example, does not count as its harm.
        """
        budget = self._budget
        if budget is None or seconds <= 0 or expected_s <= 0:
            return
        with self._changed:
            now_s = self._clock()
            self._decoding_until_s = now_s + max(IDLE_S, IDLE_STEPS * seconds)
            start_s = now_s - seconds
            turns = [turn for turn in self._turns if turn.end_s >= start_s]
            self._turns = deque(turns)
            n_bytes = sum(turn.n_bytes for turn in turns if turn.start_s >= start_s)
            is_quiet = not turns
            if n_bytes:
                budget.observe_busy(seconds, expected_s, n_bytes)
            elif is_quiet and self._was_quiet:
                budget.observe_quiet(seconds, expected_s)
            else:
                budget.pass_by()
            self._was_quiet = is_quiet
            self._changed.notify_all()

    def press(self, is_pressed: bool) -> None:
        """Whether what waits to be written keeps too much of a pool from being freed."""
        if is_pressed is not self._is_pressed:
            with self._changed:
                self._is_pressed = is_pressed
                self._changed.notify_all()

    @contextmanager
    def hurry(self) -> Iterator[None]:
        """Somebody waits for the copies: no limit within."""
        self._hurry(1)
        try:
            yield
        finally:
            self._hurry(-1)

    def stop(self) -> None:
        """No limit from now on."""
        self._hurry(1)

    def _hurry(self, n: int) -> None:
        with self._changed:
            self._n_hurrying += n
            self._changed.notify_all()

    # -- the copying threads ------------------------------------------------------------------

    def portions(self, n_pages: int, page_bytes: int) -> Iterator[slice]:
        """Stretches of a job's pages to move one at a time: all at once if there is no budget."""
        step = n_pages if self._budget is None else max(1, PORTION_BYTES // page_bytes)
        for at in range(0, n_pages, max(1, step)):
            yield slice(at, min(at + step, n_pages))

    @contextmanager
    def turn(self, n_bytes: int) -> Iterator[float]:
        """Waits until `n_bytes` may be moved, which is done within; gives the seconds waited."""
        if self._budget is None:
            yield 0.0
            return
        began_s = self._clock()
        with self._changed:
            self._wait(self._budget)
            now_s = self._clock()
            self._next_s = max(self._next_s, now_s) + n_bytes / self._budget.bytes_per_s
            turn = _Turn(n_bytes, now_s)
            self._turns.append(turn)
            if len(self._turns) > TURNS_MAX:
                self._turns.popleft()
        try:
            yield now_s - began_s
        finally:
            turn.end_s = self._clock()

    def _wait(self, budget: InterferenceBudget) -> None:
        while True:
            now_s = self._clock()
            if not self._is_limited(now_s):
                self._next_s = now_s
                return
            if budget.wants_quiet:
                pause_s = self._decoding_until_s - now_s
            elif now_s < self._next_s:
                pause_s = min(self._next_s, self._decoding_until_s) - now_s
            else:
                return
            self._changed.wait(pause_s)

    def _is_limited(self, now_s: float) -> bool:
        return now_s < self._decoding_until_s and not self._n_hurrying and not self._is_pressed
