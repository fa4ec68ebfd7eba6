"""What the instance did when, as a Chrome trace (chrome://tracing, ui.perfetto.dev)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tiered_kv.metrics.timeline import Event, Tracks, counters, span


class Timeline:
    """Collects spans and counters in the Trace Event Format; times in seconds go in."""

    def __init__(self, *, max_events: int = 500_000) -> None:
        """Stops collecting, and says so in `truncated`, at `max_events`."""
        self._events: list[Event] = []
        self._tracks = Tracks()
        self._max_events = max_events
        self.truncated = False

    def span(self, track: str, name: str, start_s: float, end_s: float, **args: float) -> None:
        """Something that took from `start_s` to `end_s`, on the row `track`."""
        self._add(span(self._tracks.number(track), name, start_s, end_s, args))

    def counters(self, name: str, at_s: float, values: dict[str, float]) -> None:
        """Values that hold from `at_s` on, drawn as one stacked chart called `name`."""
        self._add(counters(name, at_s, values))

    def to_json(self) -> dict[str, Any]:
        """The whole trace, ready for json.dump."""
        return {
            "traceEvents": self._tracks.names() + self._events,
            "displayTimeUnit": "ms",
            "metadata": {"truncated": self.truncated},
        }

    def _add(self, event: Event) -> None:
        if len(self._events) < self._max_events:
            self._events.append(event)
        else:
            self.truncated = True


def transfer_spans(timeline: Timeline | None) -> Callable[[str, float, float, int], None] | None:
    """An observer of links that draws each transfer on the link's own row; None if nowhere."""
    if timeline is None:
        return None

    def observe(link: str, start_s: float, end_s: float, n_bytes: int) -> None:
        timeline.span(link, f"{n_bytes / 1e6:.0f} MB", start_s, end_s, n_bytes=n_bytes)

    return observe
