"""Copies between device and host: ours and upstream's, alone and beside forward passes.

"Beside" is what a decoding batch feels: passes over the matrices of the model's layers, one after
the other as in decoding (attention left out), while another thread keeps copying. The slow-down of
a pass is the interference with the time per output token.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmark.gpu.pools import (
    UPSTREAM,
    MemcpyMover,
    Mover,
    OurMover,
    UpstreamBackend,
    UpstreamMover,
)
from benchmark.gpu.setting import NotHereError, Setting
from benchmark.gpu.timing import median_s, synchronize

#: (rows, columns) of a layer's matrices: QKV, output, gate and up, down; Llama-3.1-8B's.
MATRICES = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096))
SMALL_MATRICES = ((64, 96), (64, 64), (64, 256), (128, 64))
DECODE_BATCH = 32


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
    pass_s: float | None = None
    """Median forward pass beside it."""
    interference: float | None = None
    """How much longer a forward pass takes: 0.03 is 3%."""
    reason: str | None = None
    """Why there are no figures."""


def measure(setting: Setting) -> dict[str, Any]:
    """Rows for every way to move; and whether pages came back as they were."""
    passes = ForwardPasses(setting)
    alone_s = passes.median_s()
    makers: list[tuple[str, Callable[[], Mover]]] = [
        ("memcpy", lambda: MemcpyMover(setting, max(setting.transfer_tokens))),
        ("ours", lambda: OurMover(setting, max(setting.transfer_tokens))),
        ("ours, fp8", lambda: OurMover(setting, max(setting.transfer_tokens), "fp8")),
        *((backend.name, upstream_maker(setting, backend)) for backend in UPSTREAM),
    ]
    rows: list[Row] = []
    memcpy: dict[tuple[str, int], float] = {}
    exact: dict[str, bool | None] = {}
    for name, make in makers:
        try:
            with contextlib.closing(make()) as mover:
                # Lossy formats are judged by the part `kernels`.
                exact[name] = None if "fp8" in name else round_trip_is_exact(mover, setting)
                for direction, tokens, work in moves(mover, setting):
                    rows.append(
                        measure_row(setting, name, direction, tokens, work, passes, alone_s, memcpy)
                    )
        except NotHereError as missing:
            rows.append(Row(name, "both", 0, 0, reason=str(missing)))
        except Exception as error:
            if not name.startswith("HiCache"):
                raise
            # One of upstream's ways that fails is no reason to measure no other.
            rows.append(Row(name, "both", 0, 0, reason=f"{type(error).__name__}: {error}"))
        gc.collect()
        if setting.on_gpu:
            torch.cuda.empty_cache()
    return {
        "shape": setting.shape.name,
        "page_bytes": setting.shape.page_bytes,
        "pass_alone_s": alone_s,
        "exact": exact,
        "rows": [asdict(row) for row in rows],
    }


def upstream_maker(setting: Setting, backend: UpstreamBackend) -> Callable[[], Mover]:
    return lambda: UpstreamMover(setting, max(setting.transfer_tokens), backend)


def moves(mover: Mover, setting: Setting) -> Iterator[tuple[str, int, Callable[[], None]]]:
    for direction, move in (("to device", mover.to_device), ("to host", mover.to_host)):
        for tokens in setting.transfer_tokens:
            yield direction, tokens, lambda move=move, tokens=tokens: move(tokens)  # type: ignore[misc]


def measure_row(
    setting: Setting, name: str, direction: str, tokens: int, work: Callable[[], None],
    passes: ForwardPasses, alone_s: float, memcpy: dict[tuple[str, int], float],
) -> Row:  # fmt: skip
    seconds = median_s(work, setting.device, setting.repeats)
    n_bytes = tokens * setting.shape.token_bytes
    speed = n_bytes / seconds
    if name == "memcpy":
        memcpy[direction, tokens] = speed
    pass_s = None
    if tokens == max(setting.transfer_tokens):
        with kept_busy(work, setting):
            pass_s = passes.median_s()
    return Row(
        mover=name,
        direction=direction,
        tokens=tokens,
        n_bytes=n_bytes,
        seconds=seconds,
        bytes_per_s=speed,
        share_of_memcpy=speed / memcpy[direction, tokens],
        pass_s=pass_s,
        interference=pass_s / alone_s - 1 if pass_s is not None else None,
    )


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


class ForwardPasses:
    """The matrix products of decoding one token for each of a batch of requests."""

    def __init__(self, setting: Setting) -> None:
        shapes = SMALL_MATRICES if setting.is_small else MATRICES
        # Read once a pass: every layer needs its own, or the device's cache serves them.
        self._weights = [
            torch.randn(rows, columns, device=setting.device, dtype=torch.bfloat16) * 0.02
            for _ in range(setting.shape.n_layers)
            for rows, columns in shapes
        ]
        self._inputs = {
            rows: torch.randn(DECODE_BATCH, rows, device=setting.device, dtype=torch.bfloat16)
            for rows, _ in shapes
        }
        self._setting = setting

    def run(self) -> None:
        for weight in self._weights:
            torch.mm(self._inputs[weight.shape[0]], weight)

    def median_s(self) -> float:
        """Of 30 passes in the current stream, each waited for by itself."""
        seconds = []
        for turn in range(5 if self._setting.is_small else 35):
            start = time.perf_counter()
            self.run()
            if self._setting.on_gpu:
                torch.cuda.current_stream().synchronize()
            if turn >= (1 if self._setting.is_small else 5):
                seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)


@contextlib.contextmanager
def kept_busy(work: Callable[[], None], setting: Setting) -> Iterator[None]:
    """Another thread repeats `work`, in a stream of its own, until the end."""
    is_over = threading.Event()
    errors: list[BaseException] = []

    def repeat() -> None:
        try:
            stream = torch.cuda.Stream(setting.device) if setting.on_gpu else None
            with torch.cuda.stream(stream):
                while not is_over.is_set():
                    work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=repeat, name="copies")
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
    if errors:
        raise errors[0]
