"""The streams that forward passes run in, as copies meet them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tiered_kv.tiers.cuda_streams import CudaStream
from tiered_kv.tiers.streams import After, Point, Wait


def launched_so_far(forward_stream: torch.cuda.Stream) -> After:
    """What waits for these sees all that forward passes launched until now have written."""
    streams = (torch.cuda.current_stream(), forward_stream)
    return tuple(CudaStream(stream).record() for stream in streams)


def pass_holder(forward_stream: torch.cuda.Stream, *, overlaps: bool) -> Callable[[Point], None]:
    """Makes forward passes that are launched from now on wait for a point.

    overlaps: whether they have a stream of their own. The scheduler's must not wait: sooner or
    later the scheduler waits for it.
    """
    if not overlaps:
        return lambda point: point.hold(Wait.PASSES_FOR_LOAD)
    stream = CudaStream(forward_stream)
    return lambda point: stream.wait(point, Wait.PASSES_FOR_LOAD)
