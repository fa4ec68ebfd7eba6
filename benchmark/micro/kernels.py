"""Bytes per second of gathering pages of a KV pool into page-first rows, and of scattering back.

Bytes are the pool's, so that formats compare: rows are smaller in the lossy ones. "memcpy" copies
as many bytes, contiguous, on the same device. "torch" is the vectorised path, "index_select" plain
torch as one would write a raw copy, buffer by buffer; "triton" the kernels (CUDA only). With
--pinned, rows lie in pinned host memory (CUDA only): the kernels then read and write it directly,
and memcpy is the copy engine's. Contenders take turns, because few machines are quiet; times are
medians, on a CPU of this process's CPU time, which other processes disturb less.

Example: python benchmark/micro/kernels.py --pool demo --json out.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from sgl_kernel_ext.formats import Format, PageLayout, Role
from sgl_kernel_ext.ops import PagePool, gather_pages, layout_of, scatter_pages


@dataclass(frozen=True)
class PoolShape:
    """A model's KV pool: layers, KV heads, channels of each buffer, element type."""

    layers: int
    heads: int
    head_dims: tuple[int, ...]
    dtype: str


POOLS = {
    "demo": PoolShape(30, 3, (64, 64), "float32"),  # SmolLM2-135M on the CPU
    "llama-8b": PoolShape(32, 8, (128, 128), "bfloat16"),
    "deepseek-v3": PoolShape(61, 1, (576,), "bfloat16"),
}


@dataclass(frozen=True)
class Result:
    """One contender on one op; `gb_per_s` of the pool's bytes, `of_memcpy` its part of memcpy's."""

    op: str
    format: str
    contender: str
    row_bytes: int
    gb_per_s: float
    of_memcpy: float


class Bench:
    """A pool, some of its pages in random order, and rows for them."""

    def __init__(self, options: argparse.Namespace) -> None:
        shape = POOLS[options.pool]
        self.device = torch.device(options.device)
        self.pinned = options.pinned
        self.shape = shape
        self.page_size = options.page_size
        self.n_pages = options.pages
        slots = 2 * options.pages * options.page_size
        dtype = getattr(torch, shape.dtype)
        self.buffers = [
            torch.randn(slots, shape.heads, head_dim, device=self.device).to(dtype)
            for _ in range(shape.layers)
            for head_dim in shape.head_dims
        ]
        self.pages = torch.randperm(2 * options.pages, device=self.device)[: options.pages]

    def layout(self, format_: Format) -> PageLayout:
        n_kinds = len(self.shape.head_dims)
        layers = [layer for layer in range(self.shape.layers) for _ in range(n_kinds)]
        roles = [Role.KEY, Role.VALUE][:n_kinds] * self.shape.layers
        return layout_of(format_, self.page_size, self.buffers, layers, roles)

    def rows(self, n_bytes: int) -> torch.Tensor:
        if self.pinned:
            return torch.zeros(self.n_pages, n_bytes, dtype=torch.uint8, pin_memory=True)
        return torch.zeros(self.n_pages, n_bytes, dtype=torch.uint8, device=self.device)

    def contenders(self, format_: Format) -> Iterator[tuple[str, str, Callable[[], object]]]:
        """(op, contender, what to time); the rows of a format are gathered once before."""
        layout = self.layout(format_)
        rows = self.rows(layout.page_bytes)
        if format_ is Format.RAW:
            on_device = torch.zeros(rows.shape, dtype=torch.uint8, device=self.device)
            target = rows if self.pinned else torch.zeros_like(rows)
            yield "gather", "memcpy", lambda: target.copy_(on_device)
            yield "scatter", "memcpy", lambda: on_device.copy_(target)
            if not self.pinned:
                yield "gather", "index_select", lambda: self.select(layout, rows)
                yield "scatter", "index_select", lambda: self.put(layout, rows)
        backends = ["triton"] if self.device.type == "cuda" else []
        backends += [] if self.pinned else ["torch"]
        for backend in backends:
            pool = PagePool(self.buffers, layout, backend=backend)
            gather_pages(pool, self.pages, rows)
            yield "gather", backend, lambda pool=pool: gather_pages(pool, self.pages, rows)
            yield "scatter", backend, lambda pool=pool: scatter_pages(pool, self.pages, rows)

    def paged(self, buffer: torch.Tensor) -> torch.Tensor:
        return buffer.view(torch.uint8).view(2 * self.n_pages, -1)

    def select(self, layout: PageLayout, rows: torch.Tensor) -> None:
        for share, buffer in zip(layout.buffers, self.buffers, strict=True):
            part = rows[:, share.offset : share.offset + share.n_bytes]
            part.copy_(self.paged(buffer).index_select(0, self.pages))

    def put(self, layout: PageLayout, rows: torch.Tensor) -> None:
        for share, buffer in zip(layout.buffers, self.buffers, strict=True):
            part = rows[:, share.offset : share.offset + share.n_bytes]
            self.paged(buffer).index_copy_(0, self.pages, part)

    def seconds(self, run: Callable[[], object]) -> float:
        """CPU time on a CPU; else until the device has done it."""
        if self.device.type == "cpu":
            start = time.process_time()
            run()
            return time.process_time() - start
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        run()
        last.record()
        last.synchronize()
        return 1e-3 * first.elapsed_time(last)


def measure(bench: Bench, formats: list[Format], turns: int) -> list[Result]:
    layouts = {format_: bench.layout(format_) for format_ in formats}
    pool_bytes = layouts[Format.RAW].page_bytes * bench.n_pages
    results: list[Result] = []
    memcpy: dict[str, float] = {}
    for format_ in tqdm(formats, leave=False):
        contenders = list(bench.contenders(format_))
        times: list[list[float]] = [[] for _ in contenders]
        for turn in range(turns + 1):
            for (_, _, run), mine in zip(contenders, times, strict=True):
                spent = bench.seconds(run)
                if turn:  # the first warms up, and compiles
                    mine.append(spent)
        for (op, contender, _), mine in zip(contenders, times, strict=True):
            rate = pool_bytes / statistics.median(mine) / 1e9
            if contender == "memcpy":
                memcpy[op] = rate
            row_bytes = layouts[format_].page_bytes
            share = rate / memcpy[op]
            results.append(Result(op, str(format_), contender, row_bytes, rate, share))
    return results


def table(results: list[Result]) -> str:
    lines = [
        f"{'op':8} {'format':6} {'contender':13} {'page bytes':>11} {'GB/s':>8} {'of memcpy':>10}"
    ]
    lines += [
        f"{r.op:8} {r.format:6} {r.contender:13} {r.row_bytes:11,} {r.gb_per_s:8.2f}"
        f" {r.of_memcpy:10.0%}"
        for r in results
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    there = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=there, help="cpu or cuda; by default what is there")
    parser.add_argument("--pool", choices=POOLS, default="demo", help="whose shape")
    parser.add_argument("--page-size", type=int, default=64, help="tokens of a page")
    parser.add_argument("--pages", type=int, default=16, help="pages copied; the pool has twice")
    parser.add_argument("--pinned", action="store_true", help="rows in pinned host memory (CUDA)")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch, on the CPU")
    parser.add_argument("--turns", type=int, default=9, help="measurements of each")
    parser.add_argument("--hardware", default="", help="what to call this machine in the JSON")
    parser.add_argument("--json", type=Path, help="write the results to this file, too")
    options = parser.parse_args()
    if options.pinned and options.device == "cpu":
        parser.error("--pinned compares with a GPU's copy engine; it needs --device cuda")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    results = measure(Bench(options), list(Format), options.turns)
    print(table(results))
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        report = {"settings": settings, "results": [asdict(result) for result in results]}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
