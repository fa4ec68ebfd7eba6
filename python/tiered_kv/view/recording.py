"""Recordings: what a server showed, a line of JSON each, to be watched again without it."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tiered_kv.core.errors import ConfigError
from tiered_kv.snapshot.schema import VERSION

_HEADER = {"tiered_kv_recording": VERSION}


@dataclass(frozen=True, slots=True)
class Line:
    """What was seen at `at_s` (Unix time): a snapshot, or why there was none."""

    at_s: float
    snapshot: dict[str, Any] | None
    error: str = ""


class Recorder:
    """Writes a recording; one that is cut short can be replayed as far as it goes.

    Compressed if the file's name ends with .gz. Raises ConfigError if it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            # What is cached and who waits is nobody else's business.
            plain = os.fdopen(os.open(path, flags, 0o600), "wb")
        except OSError as error:
            raise ConfigError(
                f"--record {path} cannot be written ({error.strerror}); name a file in a directory "
                "that exists and is writable."
            ) from None
        self._plain = plain
        self._file: IO[bytes] | gzip.GzipFile = plain
        if path.suffix == ".gz":
            self._file = gzip.GzipFile(fileobj=plain, mode="wb")
        self._write(_HEADER)

    def add(self, line: Line) -> None:
        what = {"error": line.error} if line.snapshot is None else {"snapshot": line.snapshot}
        self._write({"at_s": line.at_s, **what})

    def close(self) -> None:
        self._file.close()
        self._plain.close()

    def _write(self, value: dict[str, Any]) -> None:
        self._file.write(json.dumps(value, separators=(",", ":")).encode() + b"\n")
        self._file.flush()


def read_recording(path: Path) -> list[Line]:
    """Its lines. Raises ConfigError if it is no recording, or has nothing in it."""
    try:
        texts = list(_texts(path))
    except OSError as error:
        raise ConfigError(
            f"--replay {path} cannot be read ({error.strerror or error}); name a file that "
            "--record has written."
        ) from None
    lines: list[Line] = []
    # The last line may be cut short: the recorder was killed.
    with suppress(ValueError, KeyError, TypeError, AttributeError):
        if json.loads(texts[0] if texts else "{}") == _HEADER:
            for text in texts[1:]:
                value = json.loads(text)
                lines.append(Line(value["at_s"], value.get("snapshot"), value.get("error", "")))
    if not lines:
        raise ConfigError(
            f"--replay {path} holds no recording of this release; name a file that --record has "
            "written."
        )
    return lines


def _texts(path: Path) -> Iterator[str]:
    opener = gzip.open if path.suffix == ".gz" else open
    # A compressed file that is cut short ends with an EOFError.
    with opener(path, "rt", encoding="utf-8", errors="replace") as file, suppress(EOFError):
        yield from file
