"""Decode attention of one layer: a gang's shared KV read once, or by every request.

One gang, one level. "rows" is the runner with a plan without levels, "cascade" reads the shared
part once, and "plain" is what SGLang does without us: on a CPU one fused kernel call per request
over its gathered context (its torch_native backend), on a GPU FlashInfer's decode wrapper. "of
bytes" is the speed-up of cascade over plain as a part of what the bytes of KV read would allow;
"error" is cascade's largest difference from plain, relative to plain's largest value.

The contenders take turns, because few machines are quiet; times are medians, and the speed-up is
the median of the turns' ratios. With --cpu-time they are CPU time of this process, which other
processes disturb less; use it with one thread. On a GPU a turn is 20 calls in a CUDA graph.

Example: python benchmark/micro/cascade_attention.py --rows 4 16 32 --shared 256 1024 4096
         python benchmark/micro/cascade_attention.py --device cuda --dtype bfloat16 \\
             --shape 32 8 128 --rows 8 32 128 --shared 512 2048 8192 32768
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

from tiered_kv.attention.flashinfer_runner import FlashInferCascadeRunner, KernelShape
from tiered_kv.attention.grouping import Context, GroupingCosts, best_plans
from tiered_kv.attention.plan import CascadePlan
from tiered_kv.attention.runner import CascadeRunner, PageTables
from tiered_kv.attention.torch_runner import TorchCascadeRunner

HEADINGS = ("rows", "shared", "own", "plain ms", "rows ms", "cascade ms", "prepare ms", "speed-up",
            "of bytes", "error")  # fmt: skip
CALLS_IN_GRAPH = 20


class Layer:
    """One layer's KV and one batch, whose first tokens are shared, in slots all over the pool."""

    def __init__(self, options: argparse.Namespace, n_rows: int, n_shared: int) -> None:
        n_heads, n_kv_heads, head_dim = options.shape
        own, dtype = options.own, getattr(torch, options.dtype)
        pool = torch.randperm(n_shared + n_rows * own).int()
        slots = torch.empty(n_rows, n_shared + own, dtype=torch.int32)
        slots[:, :n_shared] = pool[:n_shared]
        slots[:, n_shared:] = pool[n_shared:].view(n_rows, own)
        self.slots = slots.to(options.device)
        shape = (len(pool), n_kv_heads, head_dim)
        self.keys = torch.randn(shape, device=options.device).to(dtype)
        self.values = torch.randn(shape, device=options.device).to(dtype)
        self.query = torch.randn(n_rows, n_heads, head_dim, device=options.device).to(dtype)
        self.scale = head_dim**-0.5
        rows = torch.arange(n_rows, device=options.device)
        self.tables = PageTables(self.slots, rows, (n_shared + own,) * n_rows)
        contexts = [Context(n_shared + own, ((1, n_shared),))] * n_rows
        self.plans = best_plans(contexts, GroupingCosts(), 1)

    def new_runner(self) -> CascadeRunner:
        if self.query.device.type == "cpu":
            return TorchCascadeRunner()
        shape = KernelShape(
            n_query_heads=self.query.shape[1],
            n_kv_heads=self.keys.shape[1],
            head_dim=self.query.shape[2],
            query_dtype=self.query.dtype,
            kv_dtype=self.keys.dtype,
        )
        return FlashInferCascadeRunner(shape, self.query.device)

    def prepared(self, plan: CascadePlan) -> Callable[[torch.Tensor], object]:
        runner = self.new_runner()
        runner.prepare(plan, self.tables)
        return lambda output: runner.run(self.query, self.keys, self.values, output, self.scale)

    def plain(self, output: torch.Tensor) -> None:
        """As SGLang's torch_native backend decodes."""
        for row in range(len(self.query)):
            k, v = (
                cache[self.slots[row]].movedim(0, 1)[None] for cache in (self.keys, self.values)
            )
            output[row] = scaled_dot_product_attention(
                self.query[row][None, :, None],
                k,
                v,
                scale=self.scale,
                enable_gqa=self.query.shape[1] != self.keys.shape[1],
            )[0, :, 0]


def measure(options: argparse.Namespace, n_rows: int, n_shared: int) -> dict[str, float]:
    layer = Layer(options, n_rows, n_shared)
    on_cpu = options.device == "cpu"
    rows, cascade = (layer.prepared(plan) for plan in layer.plans)
    contenders = {"plain": layer.plain if on_cpu else rows, "rows": rows, "cascade": cascade}
    outputs = {name: torch.empty_like(layer.query) for name in contenders}
    for name, run in contenders.items():
        run(outputs[name])
    timers = {
        name: cpu_timer(options, run, outputs[name]) if on_cpu else graph_timer(run, outputs[name])
        for name, run in contenders.items()
    }
    again = layer.new_runner()
    turns: dict[str, list[float]] = {name: [] for name in (*contenders, "prepare")}
    for turn in range(options.turns + 1):
        times = {name: timer() for name, timer in timers.items()}
        start = time.perf_counter()
        again.prepare(layer.plans[-1], layer.tables)
        times["prepare"] = 1e3 * (time.perf_counter() - start)
        if turn:  # the first warms up
            for name, ms in times.items():
                turns[name].append(ms)
    ratios = [p / c for p, c in zip(turns["plain"], turns["cascade"], strict=True)]
    speed_up, own = statistics.median(ratios), options.own
    by_bytes = n_rows * (n_shared + own) / (n_shared + n_rows * own)
    difference = (outputs["cascade"].float() - outputs["plain"].float()).abs().max()
    return {
        "rows": n_rows,
        "shared": n_shared,
        "own": own,
        **{f"{name}_ms": statistics.median(times) for name, times in turns.items()},
        "speed_up": speed_up,
        "part_of_bytes": speed_up / by_bytes,
        "error": float(difference / outputs["plain"].float().abs().max()),
    }


def cpu_timer(
    options: argparse.Namespace, run: Callable[[torch.Tensor], object], output: torch.Tensor
) -> Callable[[], float]:
    """Gives the milliseconds of one call."""
    clock = time.process_time if options.cpu_time else time.perf_counter

    def timed() -> float:
        start = clock()
        run(output)
        return 1e3 * (clock() - start)

    return timed


def graph_timer(run: Callable[[torch.Tensor], object], output: torch.Tensor) -> Callable[[], float]:
    """Gives the milliseconds of one call among many in a CUDA graph: launches don't count."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS_IN_GRAPH):
            run(output)

    def timed() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / CALLS_IN_GRAPH

    return timed


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 16, 32], help="batch sizes")
    parser.add_argument(
        "--shared", type=int, nargs="+", default=[256, 1024, 4096], help="shared tokens"
    )
    parser.add_argument("--own", type=int, default=100, help="tokens of each request's own")
    parser.add_argument(
        "--shape", type=int, nargs=3, default=[9, 3, 64], metavar=("HEADS", "KV_HEADS", "SIZE"),
        help="of the attention; by default SmolLM2-135M's, the demo model's",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="float32",
        help="FlashInfer has kernels for the last two only",
    )  # fmt: skip
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of PyTorch")
    parser.add_argument("--turns", type=int, default=9, help="measurements of each")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time instead of wall time")
    parser.add_argument("--json", type=Path, help="write the rows to this file, too")
    options = parser.parse_args()
    if options.device == "cuda" and options.dtype == "float32":
        parser.error("FlashInfer has no kernels for float32; give --dtype bfloat16.")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; give --device cpu.")
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    cases = [(n_rows, n_shared) for n_rows in options.rows for n_shared in options.shared]
    print("  ".join(f"{heading:>10}" for heading in HEADINGS))
    results = []
    for n_rows, n_shared in tqdm(cases, leave=False):
        results.append(measure(options, n_rows, n_shared))
        numbers = list(results[-1].values())
        cells = [f"{n}" for n in numbers[:3]] + [f"{n:.3f}" for n in numbers[3:-1]]
        tqdm.write("  ".join(f"{cell:>10}" for cell in [*cells, f"{numbers[-1]:.1e}"]))
        # After every case: what was measured is kept if the rest fails.
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
