"""Copies between a GPU and pinned host memory, by either path, in the order of their streams.

Skipped where there is none. The order is tested without (test/property/test_copy_order.py): here
CUDA must do what the double does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from sgl_kernel_ext.formats import Format, Role
from sgl_kernel_ext.ops import PagePool, layout_of
from tiered_kv.tiers import cuda_streams, host_memory
from tiered_kv.tiers.bus_paths import DmaPath, KernelPath
from tiered_kv.tiers.cuda_streams import CudaStream
from tiered_kv.tiers.stream_copier import StreamPageCopier
from tiered_kv.tiers.streams import Point, Wait

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

PAGE_SIZE, N_LAYERS, N_PAGES = 16, 4, 64
#: Cycles of a kernel that does nothing: tens of milliseconds, in which copies would be over.
A_WHILE = 100_000_000


class Bench:
    def __init__(self, path: str) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        size = (N_PAGES * PAGE_SIZE, 8, 128)
        self.buffers = [
            torch.randn(size, dtype=torch.bfloat16, device=device) for _ in range(2 * N_LAYERS)
        ]
        layers = [layer for layer in range(N_LAYERS) for _ in range(2)]
        roles = [Role.KEY, Role.VALUE] * N_LAYERS
        layout = layout_of(Format.RAW, PAGE_SIZE, self.buffers, layers, roles)
        n_bytes = N_PAGES * layout.page_bytes
        memory = host_memory.map_private(n_bytes)
        host_memory.prepare(memory.ctypes.data, n_bytes)
        assert int(torch.cuda.cudart().cudaHostRegister(memory.ctypes.data, n_bytes, 0)) == 0
        self.host = memory.reshape(N_PAGES, layout.page_bytes)
        pool = PagePool(self.buffers, layout)
        if path == "dma":
            block = 3 * layout.page_bytes
            down, up = (DmaPath(pool, self.host, block_bytes=block) for _ in range(2))
            self.copier = StreamPageCopier(down, up, cuda_streams.open_streams(device))
        else:
            kernel = KernelPath(pool, self.host)
            self.copier = StreamPageCopier(kernel, kernel, cuda_streams.open_streams(device))
        self.forward = torch.cuda.Stream(device)
        rng = np.random.default_rng(0)
        self.device_pages = rng.permutation(N_PAGES)[:40].astype(np.int64)
        self.host_pages = rng.permutation(N_PAGES)[:40].astype(np.int64)
        pages = torch.from_numpy(self.device_pages).to(device)
        slots = pages[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE, device=device)
        self.slots = slots.flatten()
        torch.cuda.synchronize()

    def rows(self) -> list[torch.Tensor]:
        """What the pages hold, buffer by buffer."""
        torch.cuda.synchronize()
        return [buffer[self.slots].cpu() for buffer in self.buffers]

    def launched(self) -> tuple[Point, ...]:
        return (CudaStream(self.forward).record(),)

    def close(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaHostUnregister(self.host.ctypes.data)


@pytest.fixture(params=["dma", "kernel"])
def make_bench(request: pytest.FixtureRequest) -> Iterator[Callable[[], Bench]]:
    made: list[Bench] = []

    def make() -> Bench:
        made.append(Bench(request.param))
        return made[-1]

    yield make
    for bench in made:
        bench.close()


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(
        torch.equal(x.view(torch.int16), y.view(torch.int16)) for x, y in zip(a, b, strict=True)
    )


def test_pages_that_are_still_computed_arrive_as_they_will_be(
    make_bench: Callable[[], Bench],
) -> None:
    bench = make_bench()
    with torch.cuda.stream(bench.forward):
        torch.cuda._sleep(A_WHILE)
        for buffer in bench.buffers:
            buffer.add_(1)
    assert bench.copier.to_host(bench.slots, bench.host_pages, bench.launched()) > 0
    expected = bench.rows()
    for buffer in bench.buffers:
        buffer.zero_()
    torch.cuda.synchronize()
    bench.copier.begin_to_device(
        bench.host_pages, bench.slots, (), lambda layer, point: None
    ).finish()
    assert same(bench.rows(), expected)


def test_layers_wait_for_theirs_and_loads_for_what_reads_their_pages(
    make_bench: Callable[[], Bench],
) -> None:
    bench = make_bench()
    bench.copier.to_host(bench.slots, bench.host_pages, ())
    loaded = bench.rows()
    for buffer in bench.buffers:
        buffer.neg_()
    before = bench.rows()
    with torch.cuda.stream(bench.forward):
        torch.cuda._sleep(A_WHILE)
        read_first = [buffer[bench.slots] for buffer in bench.buffers]
    points: dict[int, Point] = {}
    copying = bench.copier.begin_to_device(
        bench.host_pages, bench.slots, bench.launched(), lambda i, p: points.update({i: p})
    )
    assert sorted(points) == list(range(N_LAYERS))
    read_later = []
    with torch.cuda.stream(bench.forward):
        for layer in range(N_LAYERS):
            points[layer].hold(Wait.LAYER_FOR_LOAD)
            read_later += [b[bench.slots] for b in bench.buffers[2 * layer : 2 * layer + 2]]
    assert copying.error is None
    seconds = copying.finish()
    assert seconds is not None
    assert seconds > 0
    torch.cuda.synchronize()
    assert same([rows.cpu() for rows in read_first], before)
    assert same([rows.cpu() for rows in read_later], loaded)
