"""Reading one mapping that came from outside, field by field, with errors that name the field."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from tiered_kv.core.errors import TieredKVError

LATENCY_MS_MAX = 86_400_000
"""A day: an objective beyond is a mistake in the unit."""

SHOWN_MAX = 60
"""Characters of what was sent that a message repeats."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = SHOWN_MAX


class TermsError(TieredKVError, ValueError):
    """Someone asked for what cannot be; the sentence is written for whoever sent it."""


@dataclass(frozen=True, slots=True)
class Fields:
    """A mapping, and how its fields are called in messages. None counts as not given."""

    values: Mapping[str, object]
    name: Callable[[str], str]

    def refuse_unknown(self, known: Iterable[str]) -> None:
        """Raise TermsError if there is a field that is not `known`."""
        names = list(known)
        for key in self.values:
            if key not in names:
                raise TermsError(
                    f"{self.name(str(key)[:SHOWN_MAX])} is not known; "
                    f"the known ones are: {', '.join(self.name(k) for k in names)}."
                )

    def between(self, key: str, low: float, high: float, what: str) -> float | None:
        """The number at `key`. Raises TermsError unless it is `what`, from `low` to `high`."""
        value = self.number(key)
        if value is None:
            return None
        if not low <= value <= high:
            raise self.error(key, f"{what} from {low} to {high}")
        return value

    def whole(self, key: str, low: int, high: int) -> int | None:
        """The number at `key`, without a fraction. Raises TermsError."""
        value = self.between(key, low, high, "a whole number")
        if value is None:
            return None
        if not value.is_integer():
            raise self.error(key, f"a whole number from {low} to {high}")
        return int(value)

    def seconds_of_ms(self, key: str) -> float | None:
        """Seconds, out of a number of milliseconds above 0. Raises TermsError."""
        value = self.number(key)
        if value is None:
            return None
        if not 0 < value <= LATENCY_MS_MAX:
            raise self.error(key, f"a number of milliseconds above 0, at most {LATENCY_MS_MAX}")
        return value / 1000

    def flag(self, key: str) -> bool:
        """False unless given. Raises TermsError."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.error(key, "true or false")
        return bool(value)

    def number(self, key: str) -> float | None:
        """The number at `key`; NaN, which is in no range, for whatever is no number."""
        value = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            return math.nan
        try:
            return float(value)
        except OverflowError:
            return math.inf

    def error(self, key: str, allowed: str) -> TermsError:
        return TermsError(f"{self.name(key)} must be {allowed}, not {shortened(self.values[key])}.")


def shortened(value: object) -> str:
    """`value` as Python writes it, cut to what fits a sentence."""
    return _SHORT.repr(value)
