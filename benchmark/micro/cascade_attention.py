"""Decode attention of one layer on a CPU: a gang's shared KV read once, or by every request.

One gang, one level. "plain" is one fused kernel call per request over its gathered context, as in
SGLang's torch_native backend; "rows" is the runner with a plan without levels; "cascade" reads the
shared part once. The three take turns, because few machines are quiet; times are medians, and the
ratio is the median of the turns' ratios. With --cpu-time they are CPU time of this process, which
other processes disturb less; use it with one thread.

Example: python benchmark/micro/cascade_attention.py --rows 4 16 32 --shared 256 1024 4096
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

from tiered_kv.attention.grouping import Context, GroupingCosts, best_plans
from tiered_kv.attention.runner import PageTables
from tiered_kv.attention.torch_runner import TorchCascadeRunner

HEADINGS = ("rows", "shared", "own", "plain ms", "rows ms", "cascade ms", "prepare ms", "speed-up")


def batch_of(
    options: argparse.Namespace, n_rows: int, n_shared: int
) -> dict[str, Callable[[], object]]:
    """The contenders, by name, on one batch in slots all over the pool."""
    n_heads, n_kv_heads, head_dim = options.shape
    own, scale = options.own, head_dim**-0.5
    dtype = getattr(torch, options.dtype)
    pool = torch.randperm(n_shared + n_rows * own).int()
    slots = torch.empty(n_rows, n_shared + own, dtype=torch.int32)
    slots[:, :n_shared] = pool[:n_shared]
    slots[:, n_shared:] = pool[n_shared:].view(n_rows, own)
    keys, values = torch.randn(2, len(pool), n_kv_heads, head_dim).to(dtype)
    query = torch.randn(n_rows, n_heads, head_dim).to(dtype)
    output = torch.empty_like(query)
    tables = PageTables(slots, torch.arange(n_rows), (n_shared + own,) * n_rows)
    contexts = [Context(n_shared + own, ((1, n_shared),))] * n_rows
    runners = []
    for plan in best_plans(contexts, GroupingCosts(), 1):
        runner = TorchCascadeRunner()
        runner.prepare(plan, tables)
        runners.append(runner)

    def plain() -> None:
        for row in range(n_rows):
            k, v = (cache[slots[row]].movedim(0, 1)[None] for cache in (keys, values))
            output[row] = scaled_dot_product_attention(
                query[row][None, :, None], k, v, scale=scale, enable_gqa=n_heads != n_kv_heads
            )[0, :, 0]

    return {
        "plain": plain,
        "rows": lambda: runners[0].run(query, keys, values, output, scale),
        "cascade": lambda: runners[1].run(query, keys, values, output, scale),
        "prepare": lambda: TorchCascadeRunner().prepare(plan, tables),
    }


def measure(options: argparse.Namespace, n_rows: int, n_shared: int) -> dict[str, float]:
    clock = time.process_time if options.cpu_time else time.perf_counter
    contenders = batch_of(options, n_rows, n_shared)
    turns: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(options.turns + 1):
        for name, run in contenders.items():
            start = clock()
            run()
            if turn:  # the first warms up
                turns[name].append(1e3 * (clock() - start))
    ratios = [p / c for p, c in zip(turns["plain"], turns["cascade"], strict=True)]
    return {
        "rows": n_rows,
        "shared": n_shared,
        "own": options.own,
        **{f"{name}_ms": statistics.median(times) for name, times in turns.items()},
        "speed_up": statistics.median(ratios),
    }


def main() -> None:
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
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of PyTorch")
    parser.add_argument("--turns", type=int, default=9, help="measurements of each")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time instead of wall time")
    parser.add_argument("--json", type=Path, help="write the rows to this file, too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    cases = [(n_rows, n_shared) for n_rows in options.rows for n_shared in options.shared]
    print("  ".join(f"{heading:>10}" for heading in HEADINGS))
    results = []
    for n_rows, n_shared in tqdm(cases, leave=False):
        results.append(measure(options, n_rows, n_shared))
        numbers = list(results[-1].values())
        cells = [f"{n}" for n in numbers[:3]] + [f"{n:.2f}" for n in numbers[3:]]
        tqdm.write("  ".join(f"{cell:>10}" for cell in cells))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
