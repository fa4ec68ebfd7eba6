"""Trace files line by line, with errors that say where."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tiered_kv.simulation.workload.errors import WorkloadError


class Line:
    """One record of a trace, and where it stands."""

    __slots__ = ("_values", "number", "path")

    def __init__(self, path: Path, number: int, values: Mapping[str, Any]) -> None:
        """`number` counts the file's lines from 1."""
        self.path = path
        self.number = number
        self._values = values

    def error(self, what: str) -> WorkloadError:
        """`what` is a clause without a full stop: what is wrong, and what to do."""
        return WorkloadError(f"{self.path}, line {self.number}: {what}.")

    def within(self, values: Any, name: str) -> Line:
        """A record nested in this one, called `name` in errors."""
        if not isinstance(values, dict):
            raise self.error(f"{name} must be an object, not {_shown(values)}")
        return Line(self.path, self.number, values)

    def has(self, key: str) -> bool:
        """Whether the record has `key` with a value."""
        return self._values.get(key) is not None

    def value(self, key: str) -> Any:
        """What stands under `key`. Raises WorkloadError if nothing does."""
        value = self._values.get(key)
        if value is None:
            raise self.error(f"{key} is missing; this reader needs it in every record")
        return value

    def number_of(self, key: str, *, minimum: float = 0) -> float:
        """A finite number of at least `minimum`; text is converted, as in CSV."""
        value = self.value(key)
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not (math.isfinite(number) and number >= minimum):
            raise self.error(f"{key} must be a number of at least {minimum:g}, not {_shown(value)}")
        return number

    def count(self, key: str, *, minimum: int = 0) -> int:
        """A whole number of at least `minimum`."""
        number = self.number_of(key, minimum=minimum)
        if not number.is_integer():
            raise self.error(f"{key} must be a whole number, not {_shown(self.value(key))}")
        return int(number)

    def text(self, key: str) -> str:
        """A text."""
        value = self.value(key)
        if not isinstance(value, str):
            raise self.error(f"{key} must be a text, not {_shown(value)}")
        return value

    def items(self, key: str) -> list[Any]:
        """A list."""
        value = self.value(key)
        if not isinstance(value, list):
            raise self.error(f"{key} must be a list, not {_shown(value)}")
        return value


def json_lines(path: Path) -> Iterator[Line]:
    """The objects of a JSONL file; empty lines are skipped. Raises WorkloadError."""
    for number, text in enumerate(_read(path), start=1):
        if not text.strip():
            continue
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise WorkloadError(
                f"{path}, line {number}: not JSON ({error.msg} at column {error.colno}); "
                "correct or delete the line."
            ) from None
        if not isinstance(values, dict):
            raise WorkloadError(
                f"{path}, line {number}: a JSON object is expected, not {_shown(values)}."
            )
        yield Line(path, number, values)


def csv_lines(path: Path, columns: Sequence[str]) -> Iterator[Line]:
    """The rows of a CSV file whose header has at least `columns`. Raises WorkloadError."""
    reader = csv.DictReader(_read(path))
    header = reader.fieldnames or []
    missing = [column for column in columns if column not in header]
    if missing:
        raise WorkloadError(
            f"{path}, line 1: the header lacks the column {missing[0]!r}; "
            f"this reader needs {', '.join(columns)}."
        )
    for row in reader:
        yield Line(path, reader.line_num, row)


def require_some(requests: Sequence[object], path: Path) -> None:
    """Raise WorkloadError if a trace turned out to be empty."""
    if not requests:
        raise WorkloadError(f"{path} holds no requests; give a trace with at least one.")


def _read(path: Path) -> Iterator[str]:
    try:
        # With the byte order mark that spreadsheets write, or without.
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from file
    except OSError as error:
        raise WorkloadError(
            f"{path} can't be read ({error.strerror}); give the path of a trace."
        ) from None
    except UnicodeDecodeError:
        raise WorkloadError(f"{path} is no UTF-8 text; give the path of a trace.") from None


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
