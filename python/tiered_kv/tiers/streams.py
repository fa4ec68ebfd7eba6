"""Streams, as far as copies between a GPU and host memory need them.

Everything that is asked of a stream is done later, in the order in which it was asked; two streams
are in no order but where one waits for a point of the other. Asking never waits. Every wait there
is has a name, so that a test can leave it out and show what goes wrong then (docs/overlap.md).

`cuda_streams.py` is the real thing. The tests' double carries out what was asked in any order that
streams and points allow.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from tiered_kv.tiers.slots import PageIds


class Wait(enum.Enum):
    """Who waits, and for what."""

    LOAD_FOR_LAUNCHED = "a load, for what was launched before it"
    """Passes may still read or write the device pages that it fills, and its indices may be on
    their way."""
    WRITE_FOR_LAUNCHED = "a write to the host, for what was launched before it"
    """Passes may still compute the pages."""
    LAYER_FOR_LOAD = "a layer of a forward pass, for that layer of a load"
    PASSES_FOR_LOAD = "passes, for a load of pages that replaced a request's own"
    LOADED = "the host, for a load's end"
    """Then the pages that it read may be freed, and those that it filled."""
    WRITTEN = "the host, for the end of a write"
    """Then the pages on the host may be read, and those on the device freed."""
    LOAD_GIVEN_UP = "the host, for what a load that failed had asked for"
    """Then its pages, on both sides, may be used otherwise."""
    WRITE_GIVEN_UP = "the host, for what a write that failed had asked for"


class Point(Protocol):
    """A point in a stream: what was asked of it before."""

    def hold(self, why: Wait) -> None:
        """What the calling thread launches next, in its current stream, waits for the point."""

    def reached(self, why: Wait) -> None:
        """Blocks the calling thread until the stream is there."""

    def seconds_until(self, later: Point) -> float:
        """Of the device's time. Both were recorded `timed`, and have been reached."""


#: Points in device streams that a copy must wait for; empty where there are no streams.
After = Sequence[Point]


class Stream(Protocol):
    """Work for a device, one after the other."""

    def record(self, *, timed: bool = False) -> Point:
        """The point that the stream has come to when everything asked so far is done."""

    def wait(self, point: Point, why: Wait) -> None:
        """What is asked from now on is done after `point`, which may be of another stream."""

    def run(self, kernel: Callable[[], object]) -> None:
        """Work on the device: `kernel` launches it in the current stream. It keeps its tensors."""

    def empty(self, n: int) -> torch.Tensor:
        """(n,) of int64 on the device, for this stream alone."""

    def upload(self, ids: PageIds) -> torch.Tensor:
        """A copy of `ids`, as they are now, on the device, for this stream alone."""

    def copy_rows(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copies (rows, bytes) of uint8 between the device and pinned host memory.

        Neighbouring bytes are neighbours, rows may lie apart. Raises RuntimeError.
        """


@dataclass(frozen=True, slots=True)
class CopyStreams:
    """A stream for each direction.

    use_device: called first by every thread that asks or waits for something.
    """

    to_host: Stream
    to_device: Stream
    use_device: Callable[[], None]
