"""How much of its thread's time a part of a snapshot may still take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

#: Of the scheduler's thread at once: the rest of a millisecond is for what surrounds it.
PART_S = 0.0006
#: The clock is looked at once in so many items, as looking takes as long as an item.
_LOOK_EVERY = 4


class Allowance:
    """`seconds` from now on, by `clock`, which counts the time that this thread runs."""

    def __init__(self, clock: Callable[[], float], seconds: float) -> None:
        self._clock = clock
        self._seconds = seconds
        self._began_s = clock()

    def spent_s(self) -> float:
        return self._clock() - self._began_s

    def spend(self, items: Iterable[T], share: float, at_least: int = 0) -> Iterator[T]:
        """`items`, as many of them as there is time for: until `share` of all is spent.

        The first `at_least` come in any case.
        """
        end_s = self._began_s + share * self._seconds
        for n, item in enumerate(items):
            if n >= at_least and n % _LOOK_EVERY == 0 and self._clock() > end_s:
                return
            yield item
