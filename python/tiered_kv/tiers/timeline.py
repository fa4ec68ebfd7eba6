"""What the tiers do when, written to a file while the server runs (Chrome trace, JSON array).

Every thread adds spans; one thread appends them to the file about once a second, whole lines at a
time, so that a file cut short by `kill -9` still loads: readers of the format don't insist on the
closing bracket. Both what waits to be written and the file are bounded.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

from tiered_kv.core.errors import ConfigError
from tiered_kv.core.ids import Tier
from tiered_kv.metrics.timeline import Event, Tracks, counters, span, track_name
from tiered_kv.tiers.layer_gate import WaitObserver
from tiered_kv.tiers.streams import Point
from tiered_kv.tiers.transfer import Job, JobObserver

logger = logging.getLogger(__name__)

#: The event that says when a file's zero was, on time.perf_counter().
CLOCK = "clock"
Rows: TypeAlias = dict[str, list[Event]]
"""Spans by the name of the row on which they are drawn."""
FLUSH_EVERY_S = 1.0
#: Events that may wait for the next flush; more are dropped, and counted.
WAITING_MAX = 50_000
#: Size at which a file is given up: some 400,000 events, as much as a viewer can take.
FILE_BYTES_MAX = 64 << 20


class TimelineFile:
    """A timeline of one process. `span` and `counters` may be called by any thread.

    Times are `time.perf_counter()`'s; the file counts from when it was opened. Writing stops at
    `bytes_max`, or after an I/O error: a timeline is no reason to stop serving.
    Raises ConfigError if the file cannot be written.
    """

    def __init__(
        self, path: Path, *, bytes_max: int = FILE_BYTES_MAX, waiting_max: int = WAITING_MAX
    ) -> None:
        self.path = path
        self.n_dropped = 0
        self._bytes_left = bytes_max
        self._waiting_max = waiting_max
        self._waiting: deque[Event] = deque()
        self._tracks = Tracks()
        self._lock = threading.Lock()
        # Of the file; taken before the other, which the scheduler's thread must get at once.
        self._file_lock = threading.Lock()
        self._started_s = time.perf_counter()
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
            self._file: int | None = os.open(path, flags, 0o600)
        except OSError as error:
            raise ConfigError(
                f"--tiered-kv-trace-file {path} cannot be written ({error.strerror}); name a file "
                "in a directory that exists and is writable."
            ) from None
        # On Linux this clock is the machine's: other processes can tell what was when.
        clock = {"ph": "M", "name": CLOCK, "pid": 0, "args": {"perf_counter_s": self._started_s}}
        self._append(b"[\n" + json.dumps(clock).encode() + b",\n")
        self._closing = threading.Event()
        self._thread = threading.Thread(
            target=self._flush_regularly, name="tiered-kv-timeline", daemon=True
        )
        self._thread.start()

    def span(
        self, track: str, name: str, start_s: float, end_s: float, **args: float | int | str
    ) -> None:
        """Something that took from `start_s` to `end_s`, on the row `track`."""
        with self._lock:
            number = self._number(track)
            origin = self._started_s
            self._add(span(number, name, start_s - origin, end_s - origin, args))

    def counters(self, name: str, **values: float) -> None:
        """Values that hold from now on, drawn as one chart called `name`."""
        with self._lock:
            self._add(counters(name, time.perf_counter() - self._started_s, values))

    def _number(self, track: str) -> int:
        is_new = track not in self._tracks
        number = self._tracks.number(track)
        if is_new:
            self._waiting.append(track_name(number, track))
        return number

    def _add(self, event: Event) -> None:
        if len(self._waiting) < self._waiting_max and self._file is not None:
            self._waiting.append(event)
        else:
            self.n_dropped += 1

    def flush(self) -> None:
        """Appends what waits to the file."""
        with self._file_lock:
            with self._lock:
                events, self._waiting = self._waiting, deque()
            if events:
                self._append_events(events)

    def close(self) -> None:
        """Writes what is left, and the closing bracket. Later spans are dropped."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._thread.join()
        self.flush()
        with self._file_lock:
            self._finish()

    def _flush_regularly(self) -> None:
        while not self._closing.wait(FLUSH_EVERY_S):
            self.flush()

    def _append_events(self, events: Iterable[Event]) -> None:
        events = list(events)
        lines = b"".join(json.dumps(event).encode() + b",\n" for event in events)
        if len(lines) > self._bytes_left:
            logger.warning("Tiered KV: the timeline %s is full; it ends here.", self.path)
            self.n_dropped += len(events)
            self._finish()
            return
        self._bytes_left -= len(lines)
        self._append(lines)

    def _finish(self) -> None:
        # The last element: every line before it ends with a comma.
        end = {"ph": "M", "name": "end", "pid": 0, "args": {"dropped": self.n_dropped}}
        self._append(json.dumps(end).encode() + b"\n]\n")
        self._stop()

    def _append(self, data: bytes) -> None:
        """One write per call, so that a file never ends within a line but when the disk is full."""
        if self._file is None:
            return
        try:
            os.write(self._file, data)
        except OSError as error:
            logger.warning("Tiered KV: the timeline %s ends here: %s.", self.path, error)
            self._stop()

    def _stop(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file = None


def transfer_spans(timeline: TimelineFile) -> JobObserver:
    """Draws each job of a transfer queue on the queue's own row, without its time in the queue."""

    def observe(queue: str, job: Job, start_s: float, end_s: float, n_done: int) -> None:
        request = getattr(job, "rid", None)
        about = {} if request is None else {"request": str(request)}
        timeline.span(queue, f"{n_done} pages", start_s, end_s, asked=job.n_pages, **about)

    return observe


#: Rows and names that `benchmark/serving/load_timeline.py` looks for.
LAYER_COPIES = "host-to-device, by layer"
LAYER_WAITS = "forward pass waits for layers"
REQUESTS = "requests wait for the disk"
PASSES = "forward passes"


def store_reads(tier: Tier) -> str:
    """The row of the reads from a cold store."""
    return f"{tier.name.lower()} reads"


def draw_waits(timeline: TimelineFile) -> WaitObserver:
    """An observer of a gate: from when a pass wanted a layer of a load to when it had it."""

    def observe(load: int, layer: int, start_s: float, end_s: float) -> None:
        timeline.span(LAYER_WAITS, f"layer {layer}", start_s, end_s, load=load, layer=layer)

    return observe


def draw_layers(
    timeline: TimelineFile, load: int, start_s: float, layer_ends_s: list[float]
) -> None:
    """The copies of a load's layers, which follow each other from `start_s` on."""
    for layer, end_s in enumerate(layer_ends_s):
        timeline.span(LAYER_COPIES, f"layer {layer}", start_s, end_s, load=load, layer=layer)
        start_s = end_s


def layer_ends(told: Sequence[tuple[float, Point | None]], ended_s: float) -> list[float]:
    """When each layer of a load that ended at `ended_s` was there, in order.

    told: when each was told of, and with which point. With a point it had only been asked for by
    then: the last one was there at the end, and the others as long before as the points say, which
    were recorded `timed`.
    """
    _, last = told[-1]
    return [
        at_s if point is None or last is None else ended_s - point.seconds_until(last)
        for at_s, point in told
    ]


def read_events(path: Path) -> list[Event]:
    """The events of a timeline's file, also of one whose writer was killed."""
    text = path.read_text().strip()
    if not text.endswith("]"):
        text = text.rstrip(",") + "]"
    events: list[Event] = json.loads(text)
    return events


def rows_of(events: list[Event]) -> Rows:
    """The spans by the name of their row, in the order of their start."""
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    rows: Rows = {name: [] for name in names.values()}
    for event in events:
        if event["ph"] == "X":
            rows[names[event["tid"]]].append(event)
    for spans in rows.values():
        spans.sort(key=lambda e: float(e["ts"]))
    return rows
