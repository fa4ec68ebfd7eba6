"""Both copiers move exactly the bytes of the pages asked for, and nothing else, in both directions.

The expected bytes are computed by indexing, page by page, without any of the module's helpers. The
accelerator's copier runs on a double of its streams, which does everything at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support_tiers.stream_copiers import stream_copier
from tiered_kv.tiers.copy_paths import DMA, KERNEL
from tiered_kv.tiers.device import (
    CpuPageCopier,
    DeviceSlots,
    LayerDone,
    PageCopier,
    buffer_format,
    byte_pages,
    contiguous_runs,
    page_ids,
)
from tiered_kv.tiers.streams import Point

pytestmark = pytest.mark.timeout(60)

N_DEVICE_PAGES = 11
N_HOST_PAGES = 13


@dataclass(frozen=True)
class Shape:
    """The rows of one layer's buffers, as an attention kind lays them out."""

    rows: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    page_size: int
    n_layers: int = 3


SHAPES = {
    "mha-bf16": Shape(((2, 8), (2, 8)), torch.bfloat16, 4),
    "mha-float32": Shape(((1, 6), (1, 6)), torch.float32, 16),
    "mha-uint8": Shape(((3, 5), (3, 5)), torch.uint8, 1),
    "mha-fp8": Shape(((2, 8), (2, 8)), torch.float8_e4m3fn, 4),
    "mha-k-wider-than-v": Shape(((2, 12), (2, 8)), torch.bfloat16, 2),
    "mla-bf16": Shape(((1, 36),), torch.bfloat16, 4),
    "mla-float32": Shape(((1, 9),), torch.float32, 2),
}
COPIERS: dict[str, Callable[..., PageCopier]] = {
    "cpu": CpuPageCopier,
    "dma": partial(stream_copier, DMA),
    # Several blocks for a few pages.
    "dma, small blocks": partial(stream_copier, DMA, block_bytes=700),
    "kernel": partial(stream_copier, KERNEL),
}


class Bench:
    """Random device buffers, a random host pool, and a copier between them."""

    def __init__(self, shape: Shape, make: Callable[..., PageCopier], seed: int = 0) -> None:
        self.page_size = shape.page_size
        self.layers = [layer for layer in range(shape.n_layers) for _ in shape.rows]
        rng = np.random.default_rng(seed)
        self.buffers = []
        for _ in range(shape.n_layers):
            for row in shape.rows:
                # One slot more than whole pages: pools have such tails.
                size = ((N_DEVICE_PAGES * self.page_size) + 1, *row)
                n_bytes = int(np.prod(size)) * shape.dtype.itemsize
                data = torch.from_numpy(rng.integers(0, 256, n_bytes, dtype=np.uint8))
                self.buffers.append(data.view(shape.dtype).reshape(size))
        page_format = buffer_format(self.page_size, self.layers, self.buffers)
        self.host = rng.integers(0, 256, (N_HOST_PAGES, page_format.slot_bytes), dtype=np.uint8)
        self.copier = make(self.page_size, self.layers, self.buffers, self.host)

    def load(self, host: list[int], device: list[int], layer_done: LayerDone) -> None:
        slots = self.token_slots(device)
        self.copier.begin_to_device(ids(host), slots, (), layer_done).finish()

    def token_slots(self, pages: list[int]) -> torch.Tensor:
        return torch.tensor(
            [page * self.page_size + i for page in pages for i in range(self.page_size)],
            dtype=torch.int64,
        )

    def device_page(self, page: int) -> bytes:
        """The page's bytes, buffer after buffer, token after token."""
        return b"".join(
            buffer[page * self.page_size + i].contiguous().view(torch.uint8).numpy().tobytes()
            for buffer in self.buffers
            for i in range(self.page_size)
        )

    def device_pages(self) -> list[bytes]:
        return [self.device_page(page) for page in range(N_DEVICE_PAGES)]

    def host_pages(self) -> list[bytes]:
        return [slot.tobytes() for slot in self.host]


def ids(pages: list[int]) -> npt.NDArray[np.int64]:
    return np.array(pages, dtype=np.int64)


#: Distinct pages in any order: runs of neighbours, gaps, and runs backwards all come up.
page_pairs = st.integers(0, N_DEVICE_PAGES).flatmap(
    lambda n: st.tuples(
        st.permutations(range(N_DEVICE_PAGES)).map(lambda p: list(p[:n])),
        st.one_of(
            st.permutations(range(N_HOST_PAGES)).map(lambda p: list(p[:n])),
            st.integers(0, N_HOST_PAGES - n).map(lambda at: list(range(at, at + n))),
        ),
    )
)


@pytest.mark.parametrize("make", COPIERS.values(), ids=COPIERS.keys())
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@settings(max_examples=5, deadline=None)
@given(pairs=page_pairs)
def test_to_host_copies_exactly_these_pages(
    shape: Shape, make: Callable[..., PageCopier], pairs: tuple[list[int], list[int]]
) -> None:
    bench = Bench(shape, make)
    device, host = pairs
    expected, untouched = bench.host_pages(), bench.device_pages()
    page_bytes = bench.copier.page_format.page_bytes
    for d, h in zip(device, host, strict=True):
        expected[h] = bench.device_page(d) + expected[h][page_bytes:]
    bench.copier.to_host(bench.token_slots(device), ids(host), ())
    assert bench.host_pages() == expected
    assert bench.device_pages() == untouched


@pytest.mark.parametrize("make", COPIERS.values(), ids=COPIERS.keys())
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@settings(max_examples=5, deadline=None)
@given(pairs=page_pairs)
def test_to_device_copies_exactly_these_pages_layer_by_layer(
    shape: Shape, make: Callable[..., PageCopier], pairs: tuple[list[int], list[int]]
) -> None:
    bench = Bench(shape, make)
    device, host = pairs
    page_bytes = bench.copier.page_format.page_bytes
    untouched, before = bench.host_pages(), bench.device_pages()
    arrived = dict(zip(device, (untouched[h][:page_bytes] for h in host), strict=True))
    done: list[int] = []

    def layer_done(layer: int, point: Point | None) -> None:
        """This layer's bytes and all earlier ones are there now."""
        assert (point is None) == isinstance(bench.copier, CpuPageCopier)
        done.append(layer)
        for segment in bench.copier.page_format.parts:
            if segment.layer <= layer:
                end = segment.offset + segment.n_bytes
                for page, expected in arrived.items():
                    found = bench.device_page(page)
                    assert found[segment.offset : end] == expected[segment.offset : end]

    bench.load(host, device, layer_done)
    assert done == list(range(shape.n_layers))
    assert bench.host_pages() == untouched
    assert bench.device_pages() == [arrived.get(p, before[p]) for p in range(N_DEVICE_PAGES)]


@pytest.mark.parametrize("make", COPIERS.values(), ids=COPIERS.keys())
def test_to_host_copies_a_part_of_what_it_is_given(make: Callable[..., PageCopier]) -> None:
    bench = Bench(SHAPES["mha-bf16"], make)
    device, host, part = [7, 2, 3, 4, 9], [0, 5, 6, 8, 1], [1, 2, 4]
    expected = bench.host_pages()
    page_bytes = bench.copier.page_format.page_bytes
    for at in part:
        expected[host[at]] = bench.device_page(device[at]) + expected[host[at]][page_bytes:]
    bench.copier.to_host(bench.token_slots(device), ids(host), (), ids(part))
    assert bench.host_pages() == expected


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_both_copiers_write_the_same_host_bytes(shape: Shape) -> None:
    """So a host slot or a disk record written by one can be read by the other."""
    benches = [Bench(shape, make) for make in COPIERS.values()]
    for bench in benches:
        bench.copier.to_host(bench.token_slots([7, 2, 3, 4, 9]), ids([0, 5, 6, 7, 1]), ())
    first, *others = benches
    assert len({bench.copier.page_format.fingerprint() for bench in benches}) == 1
    for bench in others:
        assert bench.host_pages() == first.host_pages()


@pytest.mark.parametrize("make", COPIERS.values(), ids=COPIERS.keys())
def test_an_error_in_layer_done_ends_the_copy(make: Callable[..., PageCopier]) -> None:
    bench = Bench(SHAPES["mha-bf16"], make)

    def layer_done(layer: int, point: Point | None) -> None:
        raise OSError(f"layer {layer}")

    with pytest.raises(OSError, match="layer 0"):
        bench.load([1], [1], layer_done)


def test_the_last_layer_is_written_after_the_first_was_announced() -> None:
    """What makes loading under the forward pass worth anything."""
    bench = Bench(SHAPES["mha-bf16"], CpuPageCopier)
    before, arriving = bench.device_page(3), bench.host_pages()[5]
    seen: list[bytes] = []
    bench.load([5], [3], lambda layer, _: seen.append(bench.device_page(3)))
    page = bench.copier.page_format
    cut = next(segment.offset for segment in page.parts if segment.layer == 1)
    assert seen[0] == arriving[:cut] + before[cut:]


# -- helpers ---------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=20))
def test_contiguous_runs_cover_both_lists_with_the_fewest_runs(
    pairs: list[tuple[int, int]],
) -> None:
    a, b = ids([x for x, _ in pairs]), ids([y for _, y in pairs])
    runs = list(contiguous_runs(a, b))
    assert [(x + i, y + i) for x, y, n in runs for i in range(n)] == pairs
    for (x, y, n), (next_x, next_y, _) in itertools.pairwise(runs):
        assert (next_x, next_y) != (x + n, y + n)


def test_page_ids() -> None:
    slots = torch.tensor([8, 9, 10, 11, 4, 5, 6, 7], dtype=torch.int64)
    assert page_ids(slots, 4).tolist() == [2, 1]
    assert page_ids(slots, 1).tolist() == slots.tolist()


def test_byte_pages_is_a_view() -> None:
    buffer = torch.zeros(9, 2, 3, dtype=torch.bfloat16)
    pages = byte_pages(buffer, 4)
    assert pages.shape == (2, 4 * 2 * 3 * 2)
    pages[1] = 255
    assert buffer[:4].count_nonzero() == 0
    assert buffer[4:8].view(torch.uint8).eq(255).all()
    assert buffer[8:].count_nonzero() == 0


def test_buffers_that_are_not_token_major_are_refused() -> None:
    heads_first = torch.zeros(2, 8, 3).transpose(0, 1)
    with pytest.raises(ValueError, match="contiguous"):
        byte_pages(heads_first, 4)


def test_a_slice_of_device_slots_owns_its_memory() -> None:
    whole = torch.arange(12)
    part = DeviceSlots(whole)[4:8]
    assert len(part) == 4
    assert part.tensor.untyped_storage().nbytes() == 4 * 8
    whole[:] = 0
    assert part.tensor.tolist() == [4, 5, 6, 7]
