"""Copies between device and host: ours by DMA and by kernels against memcpy, each way and both at
once, alone and beside forward passes.

"Beside" is what a decoding batch feels: passes over the matrices of the model's layers, one after
the other as in decoding (attention left out), while another thread keeps copying. The slow-down of
a pass is the interference with the time per output token.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmark.gpu.passes import ForwardPasses, kept_busy
from benchmark.gpu.pools import MemcpyMover, Mover, OurMover
from benchmark.gpu.record import Record
from benchmark.gpu.setting import NotHereError, Setting
from benchmark.gpu.timing import median_s, synchronize

DOWN, UP = "to host", "to device"
#: How long both directions run at once.
BOTH_S = 0.4

Maker = tuple[str, Callable[[], Mover]]


@dataclass(frozen=True)
class Row:
    """One way, one direction, one size."""

    mover: str
    direction: str
    tokens: int
    n_bytes: int
    seconds: float | None = None
    bytes_per_s: float | None = None
    share_of_memcpy: float | None = None
    bytes_per_s_both: float | None = None
    """While the other direction copies as much."""
    pass_s: float | None = None
    """Median forward pass beside it."""
    interference: float | None = None
    """How much longer a forward pass takes: 0.03 is 3%."""
    reason: str | None = None
    """Why there are no figures."""


def measure(setting: Setting, notes: Record) -> dict[str, Any]:
    """Rows for memcpy and our ways; and whether pages came back as they were."""
    most = max(setting.transfer_tokens)
    makers: list[Maker] = [
        ("memcpy", lambda: MemcpyMover(setting, most)),
        ("ours, dma", lambda: OurMover(setting, most)),
    ]
    if setting.on_gpu:
        makers += [
            ("ours, kernel", lambda: OurMover(setting, most, "kernel")),
            ("ours, dma, fp8", lambda: OurMover(setting, most, "dma", "fp8")),
            ("ours, kernel, fp8", lambda: OurMover(setting, most, "kernel", "fp8")),
        ]
    return measure_all(setting, notes, makers)


def measure_all(setting: Setting, notes: Record, makers: Sequence[Maker]) -> dict[str, Any]:
    """The first of `makers` is what the others are compared with; a way that fails says why."""
    passes = ForwardPasses(setting)
    alone_s = passes.median_s()
    rows: list[Row] = []
    memcpy: dict[tuple[str, int], float] = {}
    exact: dict[str, bool | None] = {}
    failed: list[str] = []

    def found() -> dict[str, Any]:
        return {
            "shape": setting.shape.name,
            "page_bytes": setting.shape.page_bytes,
            "pass_alone_s": alone_s,
            "exact": exact,
            "rows": [asdict(row) for row in rows],
        }

    for name, make in makers:
        try:
            with contextlib.closing(make()) as mover:
                # Lossy formats are judged by the step `kernels`.
                exact[name] = None if "fp8" in name else round_trip_is_exact(mover, setting)
                for row in rows_of(setting, name, mover, passes, alone_s, memcpy):
                    rows.append(row)
                    notes.so_far(found())
        except NotHereError as missing:
            rows.append(Row(name, "both", 0, 0, reason=str(missing)))
        except Exception as error:
            # One way that fails is no reason to measure no other.
            failed.append(name)
            rows.append(Row(name, "both", 0, 0, reason=f"{type(error).__name__}: {error}"))
        notes.so_far(found())
        gc.collect()
        if setting.on_gpu:
            torch.cuda.empty_cache()
    if any(name.startswith("ours") or name == "memcpy" for name in failed):
        raise RuntimeError(f"{', '.join(failed)}: see the rows")
    return found()


def rows_of(
    setting: Setting, name: str, mover: Mover, passes: ForwardPasses, alone_s: float,
    memcpy: dict[tuple[str, int], float],
) -> Iterator[Row]:  # fmt: skip
    most = max(setting.transfer_tokens)
    moves = {UP: mover.to_device, DOWN: mover.to_host}
    both = rates_both(setting, mover, most)
    for direction, move in moves.items():
        for tokens in setting.transfer_tokens:
            seconds = median_s(lambda: move(tokens), setting.device, setting.repeats)  # noqa: B023
            n_bytes = tokens * setting.shape.token_bytes
            speed = n_bytes / seconds
            memcpy.setdefault((direction, tokens), speed)
            pass_s = None
            if tokens == most:
                with kept_busy(lambda: move(most), setting):  # noqa: B023
                    pass_s = passes.median_s()
            yield Row(
                mover=name,
                direction=direction,
                tokens=tokens,
                n_bytes=n_bytes,
                seconds=seconds,
                bytes_per_s=speed,
                share_of_memcpy=speed / memcpy[direction, tokens],
                bytes_per_s_both=both[direction] if tokens == most else None,
                pass_s=pass_s,
                interference=pass_s / alone_s - 1 if pass_s is not None else None,
            )


def rates_both(setting: Setting, mover: Mover, tokens: int) -> dict[str, float]:
    """Bytes a second of each direction while both copy."""
    with kept_busy(lambda: mover.to_host(tokens), setting) as down_s:
        with kept_busy(lambda: mover.to_device(tokens), setting) as up_s:
            deadline_s = time.perf_counter() + (0.02 if setting.is_small else BOTH_S)
            while time.perf_counter() < deadline_s or not (down_s and up_s):
                time.sleep(0.002)
        rates = {DOWN: list(down_s), UP: list(up_s)}
    n_bytes = tokens * setting.shape.token_bytes
    return {direction: n_bytes / statistics.median(taken) for direction, taken in rates.items()}


def round_trip_is_exact(mover: Mover, setting: Setting) -> bool | None:
    """Whether pages come back, bit for bit, after their slots were overwritten."""
    buffers, slots = getattr(mover, "buffers", None), getattr(mover, "slots", None)
    if buffers is None or slots is None:
        return None
    n_tokens = max(setting.transfer_tokens)
    rows = slots[:n_tokens]
    for i, buffer in enumerate(buffers):
        buffer[rows] = torch.randn_like(buffer[rows]) + i
    before = [buffer[rows].clone() for buffer in buffers]
    synchronize(setting.device)
    mover.to_host(n_tokens)
    for buffer in buffers:
        buffer[rows] = 0
    synchronize(setting.device)
    mover.to_device(n_tokens)
    synchronize(setting.device)
    return all(torch.equal(buffer[rows], b) for buffer, b in zip(buffers, before, strict=True))
