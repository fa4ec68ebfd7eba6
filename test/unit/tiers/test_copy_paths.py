"""Both copy paths move the same bytes, and the one that was measured to be faster is taken.

The copier of a device in main memory, whose bytes other tests check one by one, says what both must
do. They run here on torch's backend and, in a process of its own, in Triton's interpreter.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgl_kernel_ext.formats import BufferSpec, Format, PageLayout, Role
from sgl_kernel_ext.ops import PagePool, layout_of
from support_tiers.stream_copiers import encoding_copier
from tiered_kv.tiers.bus_paths import CALLS_MAX, DmaPath, layer_runs
from tiered_kv.tiers.copy_paths import (
    DMA,
    KERNEL,
    CopyChoice,
    CopySeconds,
    choose,
    measure,
    measured_pages,
)
from tiered_kv.tiers.device import Copying, PageCopier
from tiered_kv.tiers.encoded_copier import EncodedCpuPageCopier
from tiered_kv.tiers.page_format import PageFormat

pytestmark = pytest.mark.timeout(120)

N_DEVICE_PAGES = 9
N_HOST_PAGES = 12
N_LAYERS = 2
PAGE_SIZE = 4
CPU = "cpu"


class Bench:
    """A device pool and a host pool, the same for the same seed, with a copier of either path."""

    def __init__(self, path: str, format_: Format, backend: str = "torch", seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        size = (N_DEVICE_PAGES * PAGE_SIZE + 1, 2, 16)
        self.buffers = [
            torch.randn(size, generator=generator).to(torch.float16) for _ in range(2 * N_LAYERS)
        ]
        layers = [0, 0, 1, 1]
        roles = [Role.KEY, Role.VALUE] * N_LAYERS
        layout: PageLayout = layout_of(format_, PAGE_SIZE, self.buffers, layers, roles)
        page_format = PageFormat.of_layout(layout)
        self.host = np.zeros((N_HOST_PAGES, page_format.slot_bytes), dtype=np.uint8)
        self.layout = layout
        self.copier: PageCopier
        if path == CPU:
            self.copier = EncodedCpuPageCopier(self.buffers, layout, self.host)
        else:
            self.copier = encoding_copier(path, self.buffers, layout, self.host, backend=backend)

    def down_and_up(self, down: list[int], host_pages: list[int], up: list[int]) -> list[int]:
        """Copies pages to the host, and into others; returns the layers as they were announced."""
        announced: list[int] = []
        index = np.array(host_pages, dtype=np.int64)
        self.copier.to_host(slots(down), index, ())
        copying = self.copier.begin_to_device(
            index, slots(up), (), lambda layer, _: announced.append(layer)
        )
        copying.finish()
        return announced


def slots(pages: list[int]) -> torch.Tensor:
    index = [p * PAGE_SIZE + i for p in pages for i in range(PAGE_SIZE)]
    return torch.tensor(index, dtype=torch.int64)


def check_paths_agree(
    format_: Format, down: list[int], host_pages: list[int], up: list[int], backend: str
) -> None:
    cpu = Bench(CPU, format_)
    assert cpu.down_and_up(down, host_pages, up) == list(range(N_LAYERS))
    n_bytes = cpu.copier.page_format.page_bytes
    for path in (DMA, KERNEL):
        bench = Bench(path, format_, backend)
        assert bench.copier.page_format == cpu.copier.page_format
        assert bench.down_and_up(down, host_pages, up) == list(range(N_LAYERS))
        assert np.array_equal(bench.host[:, :n_bytes], cpu.host[:, :n_bytes])
        for ours, theirs in zip(bench.buffers, cpu.buffers, strict=True):
            assert torch.equal(ours.view(torch.int16), theirs.view(torch.int16))


@settings(max_examples=40, deadline=None)
@given(data=st.data(), format_=st.sampled_from(Format))
def test_both_paths_move_the_same_bytes(data: st.DataObject, format_: Format) -> None:
    n = data.draw(st.integers(0, N_DEVICE_PAGES))

    def some(n_pages: int) -> list[int]:
        return data.draw(st.permutations(range(n_pages)))[:n]

    down, host, up = some(N_DEVICE_PAGES), some(N_HOST_PAGES), some(N_DEVICE_PAGES)
    check_paths_agree(format_, down, host, up, backend="torch")


def test_the_kernel_itself_moves_the_same_bytes() -> None:
    program = (
        "from unit_copy_paths import *\n"
        "check_paths_agree(Format.RAW, [1, 7, 3], [4, 5, 0], [2, 8, 6], backend='triton')\n"
        "print('the same')\n"
    )
    loader = (
        "import importlib.util, sys\n"
        f"path = {str(Path(__file__))!r}\n"
        "spec = importlib.util.spec_from_file_location('unit_copy_paths', path)\n"
        "sys.modules['unit_copy_paths'] = module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", loader + program],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.stdout.endswith("the same\n"), ended.stderr[-2000:]


# -- the choice -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        (CopySeconds(0.5, 0.5), CopyChoice(KERNEL, KERNEL)),
        (CopySeconds(0.5, 2.0), CopyChoice(KERNEL, DMA)),
        (CopySeconds(2.0, 0.5), CopyChoice(DMA, KERNEL)),
        (CopySeconds(0.95, 0.95), CopyChoice(DMA, DMA)),
        (CopySeconds(1.0, 1.0), CopyChoice(DMA, DMA)),
    ],
)
def test_the_kernel_must_be_clearly_faster(kernel: CopySeconds, expected: CopyChoice) -> None:
    assert choose({DMA: CopySeconds(1.0, 1.0), KERNEL: kernel}) == expected


def test_without_a_kernel_it_is_dma() -> None:
    assert choose({DMA: CopySeconds(1.0, 1.0)}) == CopyChoice(DMA, DMA)


class TimedCopier:
    """Takes as long as it is told, on a clock of the test's."""

    timed = False

    def __init__(self, clock: list[float], down_s: list[float], up_s: list[float]) -> None:
        self.page_format: Any = None
        self.clock, self.down_s, self.up_s = clock, down_s, up_s
        self.n_calls = 0

    def to_host(self, device_slots: Any, host_pages: Any, after: Any) -> None:
        self.clock[0] += self.down_s[min(self.n_calls, len(self.down_s) - 1)]

    def use_device(self) -> None:
        pass

    def begin_to_device(self, *_: Any) -> Copying:
        return Copying(self.finish)

    def finish(self) -> None:
        self.clock[0] += self.up_s[min(self.n_calls, len(self.up_s) - 1)]
        self.n_calls += 1


def test_the_first_copy_does_not_count_and_the_best_does() -> None:
    clock = [0.0]
    copiers = {
        DMA: TimedCopier(clock, [9.0, 0.03, 0.02, 0.05], [9.0, 0.04, 0.06, 0.05]),
        KERNEL: TimedCopier(clock, [0.001, 0.05], [0.001, 0.07]),
    }
    measured = measure(copiers, torch.empty(0), np.empty(0, np.int64), clock=lambda: clock[0])
    assert measured[DMA].to_host == pytest.approx(0.02)
    assert measured[DMA].to_device == pytest.approx(0.04)
    assert measured[KERNEL].to_host == pytest.approx(0.05)
    assert measured[KERNEL].to_device == pytest.approx(0.07)


def test_measuring_ends_within_a_second_if_a_round_does() -> None:
    clock = [0.0]
    copiers = {path: TimedCopier(clock, [2.0, 0.1], [2.0, 0.1]) for path in (DMA, KERNEL)}
    measure(copiers, torch.empty(0), np.empty(0, np.int64), clock=lambda: clock[0])
    assert clock[0] - 2 * 4.0 < 1.0


def test_measuring_leaves_the_device_as_it_was() -> None:
    bench = Bench(DMA, Format.RAW)
    before = [b.clone() for b in bench.buffers]
    pages, host_pages = measured_pages(bench.copier.page_format, N_DEVICE_PAGES, N_HOST_PAGES)
    measured = measure({DMA: bench.copier}, slots(pages.tolist()), host_pages)
    assert 0 < measured[DMA].to_host < 60
    assert 0 < measured[DMA].to_device < 60
    assert all(torch.equal(a, b) for a, b in zip(before, bench.buffers, strict=True))


@given(n_device=st.integers(2, 5000), n_host=st.integers(1, 5000))
def test_what_is_measured_fits_both_pools(n_device: int, n_host: int) -> None:
    page_format = PageFormat.of_buffers(16, [0, 0], [4096, 4096])
    pages, host_pages = measured_pages(page_format, n_device, n_host)
    assert len(pages) == len(host_pages) > 0
    assert len(set(pages.tolist())) == len(pages)
    assert pages.min() >= 1
    assert pages.max() < n_device
    assert host_pages.max() < n_host
    assert len(pages) * page_format.page_bytes <= 64 << 20


# -- what a load asks for --------------------------------------------------------------------------


@given(n_layers=st.integers(1, 90), n_runs=st.integers(0, 5000))
def test_layers_come_one_by_one_unless_that_takes_too_many_calls(
    n_layers: int, n_runs: int
) -> None:
    spec = BufferSpec(0, Role.KEY, 1, 16, "float16")
    specs = [dataclasses.replace(spec, layer=layer) for layer in range(n_layers)]
    runs = layer_runs(PageLayout.of(Format.RAW, 1, specs), n_runs)
    assert [layer for layers in runs for layer in layers] == list(range(n_layers))
    assert len(runs) * n_runs <= max(CALLS_MAX, n_runs)
    if n_layers * n_runs <= CALLS_MAX:
        assert len(runs) == n_layers


def test_a_block_holds_a_page_at_least_and_takes_no_more_for_more_pages() -> None:
    bench = Bench(DMA, Format.RAW)
    pool = PagePool(bench.buffers, bench.layout)
    assert DmaPath(pool, bench.host, block_bytes=1).block_bytes == bench.layout.page_bytes
    assert DmaPath(pool, bench.host, block_bytes=10_000).block_bytes == 10_000
