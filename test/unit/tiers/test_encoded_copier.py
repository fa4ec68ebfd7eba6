"""Copies that convert: what comes back is as near as the format promises, and nothing else moves.

What lies on the host is compared, byte by byte, with `sgl_kernel_ext`'s reference, which encodes
one head of one page at a time. The accelerator's copier runs on a double of its streams.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgl_kernel_ext import reference
from sgl_kernel_ext.formats import Format, PageLayout, Role
from sgl_kernel_ext.ops import layout_of
from support_tiers.stream_copiers import encoding_copier
from tiered_kv.tiers.codec import use_one_thread
from tiered_kv.tiers.copy_paths import DMA
from tiered_kv.tiers.device import PageCopier
from tiered_kv.tiers.encoded_copier import EncodedCpuPageCopier
from tiered_kv.tiers.page_format import PageFormat

pytestmark = pytest.mark.timeout(60)

N_DEVICE_PAGES = 9
N_HOST_PAGES = 12
N_LAYERS = 3
LOSSY = [f for f in Format if f.is_lossy]
#: Of the values' range within a head: half a step of the coarsest code, and rounding to bfloat16.
ERROR_MAX = {Format.FP8: 0.04, Format.INT4: 0.04, Format.KITTY: 0.18, Format.INT2: 0.18}


class StagedCpu(EncodedCpuPageCopier):
    """Needs several staging blocks for a few scattered pages."""

    STAGING_BYTES = 2000


COPIERS: dict[str, Callable[..., PageCopier]] = {
    "cpu": EncodedCpuPageCopier,
    "cpu, small staging": StagedCpu,
    "dma": partial(encoding_copier, DMA),
    "dma, small blocks": partial(encoding_copier, DMA, block_bytes=2000),
}


class Bench:
    """A device pool of normal values, a host pool of random bytes, and a copier between them."""

    def __init__(
        self,
        format_: Format,
        make: Callable[..., PageCopier] = EncodedCpuPageCopier,
        *,
        page_size: int = 8,
        is_mla: bool = False,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.page_size = page_size
        roles = [Role.KEY] if is_mla else [Role.KEY, Role.VALUE]
        row = (1, 20) if is_mla else (2, 16)
        generator = torch.Generator().manual_seed(0)
        # One slot more than whole pages: pools have such tails.
        size = (N_DEVICE_PAGES * page_size + 1, *row)
        n_buffers = N_LAYERS * len(roles)
        self.buffers = [torch.randn(size, generator=generator).to(dtype) for _ in range(n_buffers)]
        self.layout: PageLayout = layout_of(
            format_,
            page_size,
            self.buffers,
            [i // len(roles) for i in range(n_buffers)],
            roles * N_LAYERS,
        )
        slot_bytes = PageFormat.of_layout(self.layout).slot_bytes
        rng = np.random.default_rng(1)
        self.host = rng.integers(0, 256, (N_HOST_PAGES, slot_bytes), dtype=np.uint8)
        self.copier = make(self.buffers, self.layout, self.host)

    def slots(self, pages: list[int]) -> torch.Tensor:
        first = torch.tensor(pages, dtype=torch.int64).reshape(-1, 1) * self.page_size
        return (first + torch.arange(self.page_size)).reshape(-1)

    def encoded(self, page: int) -> torch.Tensor:
        """(sections of the page) by the reference, whose padding is zero."""
        out = torch.zeros(1, self.layout.page_bytes, dtype=torch.uint8)
        reference.gather(self.buffers, self.layout, [page], out)
        return self.sections(out[0])

    def on_host(self, page: int) -> torch.Tensor:
        return self.sections(torch.from_numpy(self.host[page]))

    def sections(self, row: torch.Tensor) -> torch.Tensor:
        """The bytes of a page that mean something: not the padding between its sections."""
        parts = []
        for share in self.layout.buffers:
            for section in share.sections:
                start = share.offset + section.offset
                parts.append(row[start : start + section.n_bytes])
        return torch.cat(parts)


def ids(pages: list[int]) -> npt.NDArray[np.int64]:
    return np.array(pages, dtype=np.int64)


page_pairs = st.integers(0, N_DEVICE_PAGES).flatmap(
    lambda n: st.tuples(
        st.permutations(range(N_DEVICE_PAGES)).map(lambda p: list(p[:n])),
        st.one_of(
            st.permutations(range(N_HOST_PAGES)).map(lambda p: list(p[:n])),
            st.integers(0, N_HOST_PAGES - n).map(lambda at: list(range(at, at + n))),
        ),
    )
)


def no_layer(layer: int, event: object) -> None:
    """For those who wait for the whole copy."""


@pytest.mark.parametrize("make", COPIERS.values(), ids=COPIERS.keys())
@pytest.mark.parametrize("format_", LOSSY)
@settings(max_examples=4, deadline=None)
@given(pairs=page_pairs)
def test_to_host_encodes_exactly_these_pages(
    format_: Format, make: Callable[..., PageCopier], pairs: tuple[list[int], list[int]]
) -> None:
    bench = Bench(format_, make)
    device, host = pairs
    before, pool = bench.host.copy(), [b.clone() for b in bench.buffers]
    bench.copier.to_host(bench.slots(device), ids(host), ())
    for d, h in zip(device, host, strict=True):
        assert torch.equal(bench.on_host(h), bench.encoded(d))
    others = [h for h in range(N_HOST_PAGES) if h not in host]
    assert np.array_equal(bench.host[others], before[others])
    page_bytes = bench.layout.page_bytes
    assert np.array_equal(bench.host[:, page_bytes:], before[:, page_bytes:])
    assert all(torch.equal(a, b) for a, b in zip(bench.buffers, pool, strict=True))


@pytest.mark.parametrize("make", COPIERS.values(), ids=COPIERS.keys())
@pytest.mark.parametrize("format_", LOSSY)
@settings(max_examples=4, deadline=None)
@given(pairs=page_pairs)
def test_to_device_decodes_exactly_these_pages_layer_by_layer(
    format_: Format, make: Callable[..., PageCopier], pairs: tuple[list[int], list[int]]
) -> None:
    bench = Bench(format_, make)
    device, host = pairs
    source = list(range(N_DEVICE_PAGES))[: len(host)]
    bench.copier.to_host(bench.slots(source), ids(host), ())
    expected = [b.clone() for b in bench.buffers]
    rows = torch.from_numpy(bench.host)[torch.from_numpy(ids(host))]
    reference.scatter(expected, bench.layout, device, rows[:, : bench.layout.page_bytes])
    before, slots_before = [b.clone() for b in bench.buffers], bench.host.copy()
    done: list[int] = []

    def layer_done(layer: int, event: object) -> None:
        """This layer and all earlier ones are there now, and no later one."""
        assert (event is None) == isinstance(bench.copier, EncodedCpuPageCopier)
        done.append(layer)
        for share, found, old, new in zip(
            bench.layout.buffers, bench.buffers, before, expected, strict=True
        ):
            assert torch.equal(found, new if share.spec.layer <= layer else old)

    bench.copier.begin_to_device(ids(host), bench.slots(device), (), layer_done).finish()
    assert done == list(range(N_LAYERS))
    assert np.array_equal(bench.host, slots_before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("is_mla", [False, True], ids=["mha", "mla"])
@pytest.mark.parametrize("page_size", [1, 8, 64])
@pytest.mark.parametrize("format_", LOSSY)
def test_what_comes_back_is_near_what_was_there(
    format_: Format, page_size: int, is_mla: bool, dtype: torch.dtype
) -> None:
    bench = Bench(format_, page_size=page_size, is_mla=is_mla, dtype=dtype)
    before = [b.clone() for b in bench.buffers]
    pages = list(range(N_DEVICE_PAGES))
    bench.copier.to_host(bench.slots(pages), ids(pages), ())
    for buffer in bench.buffers:
        buffer.zero_()
    bench.copier.begin_to_device(ids(pages), bench.slots(pages), (), no_layer).finish()
    n_slots = N_DEVICE_PAGES * page_size
    for found, was in zip(bench.buffers, before, strict=True):
        by_page = was[:n_slots].float().reshape(N_DEVICE_PAGES, page_size, *was.shape[1:])
        spread = by_page.amax((1, 3), keepdim=True) - by_page.amin((1, 3), keepdim=True)
        error = (found[:n_slots].float().reshape(by_page.shape) - by_page).abs()
        assert (error <= ERROR_MAX[format_] * spread).all(), (error / spread).max()
        # It is lossy: else this would test nothing.
        assert error.max() > 0


@pytest.mark.parametrize("format_", LOSSY)
def test_both_copiers_write_the_same_host_bytes(format_: Format) -> None:
    """So what one has written to disk the other can read."""
    benches = [Bench(format_, make) for make in (EncodedCpuPageCopier, COPIERS["dma"])]
    for bench in benches:
        bench.copier.to_host(bench.slots([7, 2, 3, 4, 8]), ids([0, 5, 6, 7, 1]), ())
    a, b = benches
    assert a.copier.page_format == b.copier.page_format
    for page in (0, 1, 5, 6, 7):
        assert torch.equal(a.on_host(page), b.on_host(page))


def test_smaller_formats_take_fewer_bytes() -> None:
    sizes = [Bench(f, page_size=64).copier.page_format.token_bytes for f in Format]
    by_format = dict(zip(Format, sizes, strict=True))
    assert by_format[Format.INT2] < by_format[Format.KITTY] < by_format[Format.INT4]
    assert by_format[Format.INT4] < by_format[Format.FP8] < 0.55 * by_format[Format.RAW]


def test_a_transfer_thread_leaves_the_forward_pass_its_cores() -> None:
    counts: dict[str, int] = {}

    def count(name: str) -> None:
        counts[name] = torch.get_num_threads()

    def transfer() -> None:
        use_one_thread()
        use_one_thread()
        count("transfer")

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for target, args in ((transfer, ()), (count, ("born later",))):
            thread = threading.Thread(target=target, args=args)
            thread.start()
            thread.join()
        count("forward pass")
    finally:
        torch.set_num_threads(before)
    assert counts == {"transfer": 1, "born later": 3, "forward pass": 3}
