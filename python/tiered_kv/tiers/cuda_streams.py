"""Streams of a GPU. Nothing is decided here: each call is one of CUDA's."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch

from tiered_kv.tiers.slots import PageIds
from tiered_kv.tiers.streams import CopyStreams, Point, Wait

#: Ahead of everything that has the default priority, 0: forward passes wait for loads.
LOAD_PRIORITY = -1
#: cudaMemcpyDefault: which side is the host is told by the addresses.
_BY_ADDRESS = 4


class CudaPoint:
    """An event. Who waits for it on the host sleeps, rather than spin beside a forward pass."""

    __slots__ = ("event",)

    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def hold(self, why: Wait) -> None:
        del why
        self.event.wait()

    def reached(self, why: Wait) -> None:
        del why
        self.event.synchronize()

    def seconds_until(self, later: Point) -> float:
        assert isinstance(later, CudaPoint)
        return float(self.event.elapsed_time(later.event)) / 1e3


class CudaStream:
    """See `tiers.streams.Stream`."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def record(self, *, timed: bool = False) -> CudaPoint:
        event = torch.cuda.Event(enable_timing=timed, blocking=True)
        event.record(self._stream)
        return CudaPoint(event)

    def wait(self, point: Point, why: Wait) -> None:
        del why
        assert isinstance(point, CudaPoint)
        self._stream.wait_event(point.event)

    def run(self, kernel: Callable[[], object]) -> None:
        with torch.cuda.stream(self._stream):
            kernel()

    def empty(self, n: int) -> torch.Tensor:
        # Memory that torch reuses within this stream, without asking what others do with it.
        with torch.cuda.stream(self._stream):
            return torch.empty(n, dtype=torch.int64, device=self._stream.device)

    def upload(self, ids: PageIds) -> torch.Tensor:
        # From pinned memory, which torch keeps until the copy is over: from any other the call
        # may wait for the stream.
        with torch.cuda.stream(self._stream):
            pinned = torch.from_numpy(ids).pin_memory()
            return pinned.to(self._stream.device, non_blocking=True)

    def copy_rows(self, target: torch.Tensor, source: torch.Tensor) -> None:
        n_rows, n_bytes = target.shape
        status = _memcpy_2d()(
            target.data_ptr(),
            max(target.stride(0), n_bytes),
            source.data_ptr(),
            max(source.stride(0), n_bytes),
            n_bytes,
            n_rows,
            _BY_ADDRESS,
            self._stream.cuda_stream,
        )
        if status != 0:
            raise RuntimeError(f"cudaMemcpy2DAsync failed with CUDA error {status}")


def open_streams(device: torch.device) -> CopyStreams:
    """Raises OSError if CUDA's runtime library is not where torch has it."""
    _memcpy_2d()
    return CopyStreams(
        to_host=CudaStream(torch.cuda.Stream(device)),
        to_device=CudaStream(torch.cuda.Stream(device, priority=LOAD_PRIORITY)),
        use_device=functools.partial(torch.cuda.set_device, device),
    )


@functools.cache
def _memcpy_2d() -> Callable[..., int]:
    """torch would copy rows that lie apart through a temporary of pageable memory.

    From the runtime library that torch has loaded.
    """
    major = str(torch.version.cuda).split(".")[0]
    function = ctypes.CDLL(f"libcudart.so.{major}").cudaMemcpy2DAsync
    address, size = ctypes.c_void_p, ctypes.c_size_t
    function.argtypes = [address, size, address, size, size, size, ctypes.c_int, address]
    function.restype = ctypes.c_int
    return function
