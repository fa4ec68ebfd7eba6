"""The Trace Event Format (chrome://tracing, ui.perfetto.dev): what a timeline is written in.

Times in seconds go in, on any one clock; the format counts microseconds. The simulator's timeline
and the server's (`tiers.timeline`) are made of these events.
https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: One event, ready for json.dumps.
Event = dict[str, Any]

Values = Mapping[str, float | int | str]


class Tracks:
    """Numbers for the rows of a timeline, in the order in which they are first named."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def __contains__(self, track: str) -> bool:
        return track in self._numbers

    def number(self, track: str) -> int:
        return self._numbers.setdefault(track, len(self._numbers) + 1)

    def names(self) -> list[Event]:
        """The events that name all rows so far."""
        return [track_name(number, track) for track, number in self._numbers.items()]


def track_name(number: int, track: str) -> Event:
    """Says what the row `number` is called."""
    return {"ph": "M", "name": "thread_name", "pid": 0, "tid": number, "args": {"name": track}}


def span(number: int, name: str, start_s: float, end_s: float, args: Values) -> Event:
    """Something that took from `start_s` to `end_s`, on the row `number`."""
    return {
        "ph": "X",
        "name": name,
        "pid": 0,
        "tid": number,
        "ts": start_s * 1e6,
        "dur": (end_s - start_s) * 1e6,
        "args": dict(args),
    }


def counters(name: str, at_s: float, values: Values) -> Event:
    """Values that hold from `at_s` on, drawn as one stacked chart called `name`."""
    return {"ph": "C", "name": name, "pid": 0, "ts": at_s * 1e6, "args": dict(values)}
