"""What a decoding batch feels of copies beside it: the matrix products of a forward pass."""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Callable, Iterator

import torch

from benchmark.gpu.setting import Setting

#: (rows, columns) of a layer's matrices: QKV, output, gate and up, down; Llama-3.1-8B's.
MATRICES = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096))
SMALL_MATRICES = ((64, 96), (64, 64), (64, 256), (128, 64))
DECODE_BATCH = 32


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
def kept_busy(work: Callable[[], None], setting: Setting) -> Iterator[list[float]]:
    """Another thread repeats `work`, in a stream of its own, until the end.

    Yields the seconds of each time that it was done, which grow meanwhile.
    """
    is_over = threading.Event()
    errors: list[BaseException] = []
    taken_s: list[float] = []

    def repeat() -> None:
        try:
            if setting.on_gpu:
                torch.cuda.set_device(setting.device)
            stream = torch.cuda.Stream(setting.device) if setting.on_gpu else None
            with torch.cuda.stream(stream):
                while not is_over.is_set():
                    start = time.perf_counter()
                    work()
                    if stream is not None:
                        stream.synchronize()
                    taken_s.append(time.perf_counter() - start)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=repeat, name="copies")
    thread.start()
    try:
        yield taken_s
    finally:
        is_over.set()
        thread.join()
    if errors:
        raise errors[0]
