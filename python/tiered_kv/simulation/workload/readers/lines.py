"""Trace files record by record, with errors that say where."""

from __future__ import annotations

import csv
import gzip
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tiered_kv.simulation.workload.errors import WorkloadError
from tiered_kv.simulation.workload.request import Request

MOST = 100_000_000
"""No prompt, answer or block is longer: a number above it is a mistake."""

_GZIP = b"\x1f\x8b"
_LONGEST_S = 10 * 365 * 86400.0
# Times since 1970 betray their unit by their size, if they are after 2001 (and before 5138).
_DATE_S = 1e9
_UNITS = ((1e17, 1e-9), (1e14, 1e-6), (1e11, 1e-3))


class Line:
    """One record of a trace, and where it stands."""

    __slots__ = ("_values", "number", "path", "unit")

    def __init__(
        self, path: Path, number: int, values: Mapping[str, Any], unit: str = "line"
    ) -> None:
        """`number` counts the file's lines, or what `unit` says, from 1."""
        self.path = path
        self.number = number
        self.unit = unit
        self._values = values

    def error(self, what: str) -> WorkloadError:
        """`what` is a clause without a full stop: what is wrong, and what to do."""
        return WorkloadError(f"{self.path}, {self.unit} {self.number}: {what}.")

    def within(self, values: Any, name: str) -> Line:
        """A record nested in this one, called `name` in errors."""
        if not isinstance(values, dict):
            raise self.error(f"{name} must be an object, not {shown(values)}")
        return Line(self.path, self.number, values, self.unit)

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
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not (math.isfinite(number) and number >= minimum):
            raise self.error(f"{key} must be a number of at least {minimum:g}, not {shown(value)}")
        return number

    def count(self, key: str, *, minimum: int = 0) -> int:
        """A whole number of at least `minimum`, and no more than `MOST`."""
        number = self.number_of(key, minimum=minimum)
        if not number.is_integer() or number > MOST:
            raise self.error(
                f"{key} must be a whole number up to {MOST:,}, not {shown(self.value(key))}"
            )
        return int(number)

    def text(self, key: str) -> str:
        """A text."""
        value = self.value(key)
        if not isinstance(value, str):
            raise self.error(f"{key} must be a text, not {shown(value)}")
        return value

    def items(self, key: str) -> list[Any]:
        """A list."""
        value = self.value(key)
        if not isinstance(value, list):
            raise self.error(f"{key} must be a list, not {shown(value)}")
        return value

    def time_s(self, key: str) -> float:
        """Seconds: of a number as it is, or since 1970 in any unit; or of a date in ISO 8601.

        A date such as "2023-11-16 18:15:46.6805900", perhaps with a zone, may have any digits.
        """
        value = self.value(key)
        if isinstance(value, str) and not _is_number(value):
            try:
                time = datetime.fromisoformat(value.strip())
            except ValueError:
                raise self.error(
                    f"{key} {value!r} is no time; write it like 2023-11-16 18:15:46.680, or in "
                    "seconds"
                ) from None
            return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
        number = self.number_of(key)
        factor = next((factor for least, factor in _UNITS if number >= least), 1.0)
        return number * factor


def is_date(seconds: float) -> bool:
    """Whether a time counts from 1970, not from a trace's start."""
    return seconds >= _DATE_S


def json_lines(path: Path) -> Iterator[Line]:
    """The objects of a JSONL file, or of a JSON array; empty lines are skipped.

    Either may be compressed by gzip. Raises WorkloadError.
    """
    lines = _read(path)
    is_first = True
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        if is_first and text.lstrip().startswith("["):
            yield from _entries(path, text + "".join(lines))
            return
        is_first = False
        values = _parsed(text, f"{path}, line {number}")
        if not isinstance(values, dict):
            raise WorkloadError(
                f"{path}, line {number}: a JSON object is expected, not {shown(values)}."
            )
        yield Line(path, number, values)


def _entries(path: Path, text: str) -> Iterator[Line]:
    for number, values in enumerate(_parsed(text, str(path)), start=1):
        if not isinstance(values, dict):
            raise WorkloadError(
                f"{path}, entry {number}: a JSON object is expected, not {shown(values)}."
            )
        yield Line(path, number, values, "entry")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise WorkloadError(
            f"{where}: not JSON ({error.msg} at column {error.colno}); correct or delete the line."
        ) from None
    except (ValueError, RecursionError):
        # A number of thousands of digits, or thousands of brackets.
        raise WorkloadError(f"{where}: not a record; correct or delete the line.") from None


def csv_lines(path: Path, columns: Sequence[str]) -> Iterator[Line]:
    """The rows of a CSV file whose header has at least `columns`. Raises WorkloadError.

    It may be compressed by gzip.
    """
    reader = csv.DictReader(_read(path))
    try:
        header = [name.strip() for name in reader.fieldnames or ()]
        missing = [column for column in columns if column not in header]
        if missing:
            raise WorkloadError(
                f"{path}, line 1: the header lacks the column {missing[0]!r}; "
                f"this reader needs {', '.join(columns)}."
            )
        reader.fieldnames = header
        for row in reader:
            # An empty cell is as good as none.
            yield Line(path, reader.line_num, {key: row[key] or None for key in header})
    except csv.Error as error:
        raise WorkloadError(
            f"{path}, line {reader.line_num + 1}: not CSV ({error}); correct or delete the line."
        ) from None


def require_some(requests: Sequence[object], path: Path) -> None:
    """Raise WorkloadError if a trace turned out to be empty."""
    if not requests:
        raise WorkloadError(f"{path} holds no requests; give a trace with at least one.")


def start_at_zero(requests: Sequence[Request], path: Path) -> None:
    """Shift arrivals so that the first is at 0.

    Raises WorkloadError if there are none, or if their times can't be of one unit.
    """
    require_some(requests, path)
    first_s = min(request.arrival_s for request in requests)
    last_s = max(request.arrival_s for request in requests)
    if last_s - first_s > _LONGEST_S:
        raise WorkloadError(
            f"{path} goes on for {(last_s - first_s) / 86400 / 365:,.0f} years; some of its times "
            "are in another unit, or count from another start: give them all in seconds."
        )
    for request in requests:
        request.arrival_s -= first_s


def _read(path: Path) -> Iterator[str]:
    try:
        with path.open("rb") as file:
            is_compressed = file.read(2) == _GZIP
        opened = gzip.open if is_compressed else open
        # With the byte order mark that spreadsheets write, or without.
        with opened(path, "rt", encoding="utf-8-sig", newline="") as text:
            yield from text
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise WorkloadError(f"{path} is a damaged gzip file; copy it again.") from None
    except OSError as error:
        raise WorkloadError(
            f"{path} can't be read ({error.strerror}); give the path of a trace."
        ) from None
    except UnicodeDecodeError:
        raise WorkloadError(f"{path} is no UTF-8 text; give the path of a trace.") from None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def shown(value: object) -> str:
    """A value as errors show it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
