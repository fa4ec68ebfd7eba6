"""Times of short pieces of device work."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_s(
    work: Callable[[], object], device: torch.device, repeats: int, warm_ups: int = 2
) -> float:
    """Median wall seconds from calling `work` until the device is done with it."""
    seconds = []
    for turn in range(warm_ups + repeats):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        if turn >= warm_ups:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
