"""How fast a server's own forward passes were, from the timeline that it wrote.

Reference passes before and after a replay (`pace.py`) say little about a machine whose speed
changes by a factor within seconds. The replay's own passes are there for all of its time: their
`Pace` is what they took together, over what was fitted for as many of their kind.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmark.simulation.pace import Pace
from tiered_kv.metrics.timeline import Event
from tiered_kv.scheduler.measured_costs import PassTimes
from tiered_kv.tiers.timeline import CLOCK, PASSES, read_events, rows_of

#: A server that has something to do launches its next pass sooner than this.
IDLE_S = 0.1


@dataclass(frozen=True)
class TimedPass:
    """One forward pass; times of `time.perf_counter`, the same in all processes of a machine."""

    start_s: float
    end_s: float
    chunks: tuple[tuple[int, int], ...]
    """(new tokens, tokens before them) of each request; empty for a decode."""
    context_tokens: int
    n_requests: int

    def fitted_s(self, times: PassTimes) -> float:
        if self.chunks:
            return times.prefill_pass_s(self.chunks)
        return times.decode_pass_s(self.context_tokens, self.n_requests)


def read_passes(trace: Path) -> list[TimedPass]:
    """All passes in the file that a server wrote (`--tiered-kv-trace-file`), in order."""
    events = read_events(trace)
    clock_s = next(e["args"]["perf_counter_s"] for e in events if e["name"] == CLOCK)
    return [_pass_of(span, clock_s) for span in rows_of(events)[PASSES]]


def _pass_of(span: Event, clock_s: float) -> TimedPass:
    start_s = clock_s + span["ts"] / 1e6
    args = span["args"]
    chunks = re.findall(r"(\d+) after (\d+)", args["chunks"])
    return TimedPass(
        start_s,
        start_s + span["dur"] / 1e6,
        tuple((int(new), int(before)) for new, before in chunks),
        args["context"],
        args["requests"],
    )


def own_pace(passes: Iterable[TimedPass], start_s: float, end_s: float, times: PassTimes) -> Pace:
    """The pace of what ran between the two times.

    Raises ValueError if there was no prefill or no decode.
    """
    inside = [p for p in passes if start_s <= p.start_s <= end_s]
    took_s, fitted_s = {True: 0.0, False: 0.0}, {True: 0.0, False: 0.0}
    for one, after in zip(inside, [*inside[1:], None], strict=True):
        is_prefill = bool(one.chunks)
        took_s[is_prefill] += _until(one, after)
        fitted_s[is_prefill] += one.fitted_s(times)
    if not all(fitted_s.values()):
        raise ValueError("The replay's passes are not in the timeline; was it cut short?")
    return Pace(took_s[True] / fitted_s[True], took_s[False] / fitted_s[False])


def _until(one: TimedPass, after: TimedPass | None) -> float:
    """Seconds of a pass, with what the scheduler does before the next one.

    That is in what was fitted, too: there passes are timed from one token to the next.
    """
    if after is not None and after.start_s - one.end_s < IDLE_S:
        return after.start_s - one.start_s
    return one.end_s - one.start_s
