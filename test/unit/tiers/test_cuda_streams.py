"""The thin layer over CUDA, on doubles of what torch and the runtime library offer."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from tiered_kv.tiers import cuda_streams
from tiered_kv.tiers.cuda_streams import CudaPoint, CudaStream
from tiered_kv.tiers.streams import Wait


class Calls:
    """Remembers what is called on it."""

    cuda_stream = 7

    def __init__(self) -> None:
        self.made: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *args: self.made.append((name, args))


def test_each_call_is_one_of_cudas(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, event = Calls(), Calls()
    asked: list[dict[str, bool]] = []

    def make_event(**options: bool) -> Calls:
        asked.append(options)
        return event

    monkeypatch.setattr(torch.cuda, "Event", make_event)
    ours: Any = CudaStream(stream)  # type: ignore[arg-type]
    point = ours.record(timed=True)
    ours.record()
    # Who waits on the host sleeps.
    assert asked == [
        {"enable_timing": True, "blocking": True},
        {"enable_timing": False, "blocking": True},
    ]
    ours.wait(point, Wait.LOAD_FOR_LAUNCHED)
    point.hold(Wait.LAYER_FOR_LOAD)
    point.reached(Wait.LOADED)
    assert stream.made == [("wait_event", (event,))]
    assert event.made == [
        ("record", (stream,)),
        ("record", (stream,)),
        ("wait", ()),
        ("synchronize", ()),
    ]


def test_seconds_between_points() -> None:
    class Event:
        def elapsed_time(self, later: Any) -> float:
            assert later is end
            return 250.0

    end: Any = object()
    begin: Any = Event()
    assert CudaPoint(begin).seconds_until(CudaPoint(end)) == 0.25


def memcpy_2d(
    target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int, *_: Any
) -> int:
    """What cudaMemcpy2DAsync does, and refuses."""
    if min(target_pitch, source_pitch) < width:
        return 1
    for row in range(height):
        ctypes.memmove(target + row * target_pitch, source + row * source_pitch, width)
    return 0


@pytest.mark.parametrize("n_rows", [1, 5])
def test_rows_that_lie_apart_are_one_copy(monkeypatch: pytest.MonkeyPatch, n_rows: int) -> None:
    monkeypatch.setattr(cuda_streams, "_memcpy_2d", lambda: memcpy_2d)
    stream = CudaStream(Calls())  # type: ignore[arg-type]
    whole = torch.arange(8 * 32, dtype=torch.uint8).reshape(8, 32)
    block = torch.zeros(n_rows, 12, dtype=torch.uint8)
    stream.copy_rows(block, whole[2 : 2 + n_rows, 4:16])
    assert torch.equal(block, whole[2 : 2 + n_rows, 4:16])
    other = torch.zeros_like(whole)
    stream.copy_rows(other[1 : 1 + n_rows, 20:32], block)
    expected = torch.zeros_like(whole)
    expected[1 : 1 + n_rows, 20:32] = whole[2 : 2 + n_rows, 4:16]
    assert torch.equal(other, expected)


def test_a_copy_that_cuda_refuses_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_streams, "_memcpy_2d", lambda: lambda *_: 700)
    rows = torch.zeros(2, 4, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="CUDA error 700"):
        CudaStream(Calls()).copy_rows(rows, rows)  # type: ignore[arg-type]


def test_the_runtime_library_that_torch_has_loaded_copies_rows() -> None:
    if torch.version.cuda is None:
        pytest.skip("this torch has no CUDA")
    copy: Any = cuda_streams._memcpy_2d()
    assert len(copy.argtypes) == 8
