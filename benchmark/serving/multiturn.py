"""Conversations in rounds on plain SGLang, on HiCache, on three tiers, and on a device that never
fills: the limit. Prints a table; writes it, the samples as JSON and a plot.

    python -m benchmark.serving.multiturn --model-path MODEL      chat: 256 new tokens a turn
    python -m benchmark.serving.multiturn ... --load agent        95% of a prompt is the turn before
    python -m benchmark.serving.multiturn ... --load unique       no prompt shares anything
    python -m benchmark.serving.multiturn ... --concurrency 8 --conversations 48

The device's pool is an eighth of the working set (what all conversations have at their end), the
host's is twice the device's, the disk takes everything. All servers are up at once and one of them
works: the systems take turns after every request (with --concurrency N: after 2 N requests, all
answered), in an order drawn anew each time. So all of them meet the same machine, which on shared
hardware changes its speed within minutes. Needs a machine without an accelerator, and 3.2 GB of
memory per system.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmark.command_line import RESULTS, parser_of
from benchmark.serving.conversations import Client, Load, Sample, Shape, stream
from benchmark.serving.multiturn_report import Run, machine, plot, row, table
from benchmark.serving.systems import SYSTEMS, Sizes, attention_per_linear, model_of
from harness.server import BASE_ARGS, Server
from harness.servers import servers_up

SHAPES = {
    # 256 new tokens a turn, as in a chat with retrieved passages.
    "chat": {"turns": 5, "first_tokens": 256, "turn_tokens": 252, "remembers": True},
    # Every prompt is the one before and 5% more, as coding agents send them.
    "agent": {"turns": 5, "first_tokens": 1280, "turn_tokens": 60, "remembers": True},
    "unique": {"turns": 5, "first_tokens": 256, "turn_tokens": 252, "remembers": False},
}
ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
#: For each system's own writes to end before the next system's turn.
SETTLE_S = 0.25


def arguments() -> argparse.Namespace:
    parser = parser_of("benchmark.serving.multiturn", __doc__)
    add = parser.add_argument
    add("--model-path", type=Path, required=True)
    add("--load", choices=SHAPES, default="chat")
    add("--conversations", type=int, default=10)
    add("--turns", type=int, help="instead of the load's own")
    add("--answer-tokens", type=int, default=4)
    add("--concurrency", type=int, default=1, help="requests in flight at most (default: 1)")
    add("--gap", type=float, default=0.05, help="mean seconds before a request (default: 0.05)")
    add("--repeats", type=int, default=2)
    add("--seed", type=int, default=1)
    add("--dtype", choices=ELEMENT_BYTES, default="float32",
        help="default: float32, the fastest on CPUs without bfloat16 instructions")  # fmt: skip
    add("--page-size", type=int, default=64)
    add("--host-ratio", type=float, default=2.0, help="host pool / device pool (default: 2)")
    add("--device-share", type=float, default=1 / 8, help="device pool / working set")
    usual = [name for name, system in SYSTEMS.items() if system.is_usual]
    add("--systems", nargs="+", choices=SYSTEMS, default=usual, metavar="NAME",
        help=f"which to run, of: {', '.join(SYSTEMS)} (default: {', '.join(usual)})")  # fmt: skip
    add("--scratch", type=Path, help="where disk tiers live meanwhile (default: the temp folder)")
    default = "benchmark/results/multiturn_LOAD_cCONCURRENCY"
    add("--output", type=Path, help=f"path of the results without suffix (default: {default})")
    return parser.parse_args()


def pool_sizes(options: argparse.Namespace, shape: Shape) -> Sizes:
    """In whole pages; the device takes at least one conversation at its longest, and a chunk."""
    page = options.page_size

    def pages(tokens: float) -> int:
        return -(-int(tokens) // page) * page

    device = pages(
        max(shape.working_set_tokens * options.device_share, shape.longest_tokens + 4 * page)
    )
    limit = pages(1.25 * shape.working_set_tokens * (1 if shape.remembers else shape.turns))
    model = model_of(options.model_path, ELEMENT_BYTES[options.dtype])
    return Sizes(
        page, device, pages(device * options.host_ratio), limit, int(model.kv_bytes_per_token)
    )


def common_flags(options: argparse.Namespace) -> list[object]:
    flags = [*BASE_ARGS, "--dtype", options.dtype, "--page-size", options.page_size]
    return [*flags, "--chunked-prefill-size", 2048]


def servers(
    options: argparse.Namespace, sizes: Sizes, scratch: Path, logs: Path
) -> dict[str, Server]:
    """One per system, not started yet."""
    found = {}
    for name in options.systems:
        own = scratch / name
        own.mkdir()
        log = logs / f"{name}.log"
        found[name] = SYSTEMS[name].server(
            options.model_path, common_flags(options), sizes, own, log
        )
    return found


def measure(up: dict[str, Server], load: Load, repeat: int) -> list[Run]:
    """The whole load on every server, in turns."""
    blocks = load.blocks(1 if load.concurrency == 1 else 2 * load.concurrency)
    runs = {name: Run(name, repeat, [], 0.0, server.start_seconds) for name, server in up.items()}
    rng = random.Random(load.seed)
    total = load.shape.requests * len(up)
    with tqdm(total=total, desc=f"repeat {repeat + 1}", unit="req") as bar, ExitStack() as stack:
        clients = {}
        for name, server in up.items():
            server.flush_cache()
            clients[name] = stack.enter_context(Client(load, server.url))
        for block in blocks:
            for name in rng.sample(list(up), len(up)):
                samples, seconds = clients[name].ask(block)
                runs[name].samples += samples
                runs[name].seconds += seconds
                bar.update(len(samples))
                time.sleep(SETTLE_S)
    return list(runs.values())


def warm_up(url: str, load: Load) -> None:
    """Threads, allocators and lazily imported code of the server; prompts that are never reused."""
    import requests

    shape = load.shape
    with requests.Session() as session:
        for length in (shape.first_tokens, shape.longest_tokens, shape.first_tokens):
            stream(url, session, [length % 500 + 400] * length, 4)


def as_json(
    options: argparse.Namespace, sizes: Sizes, shape: Shape, rows: Any, runs: Sequence[Run]
) -> dict[str, Any]:
    def sample(s: Sample) -> list[float]:
        return [s.turn, s.prompt_tokens, s.device, s.host, s.disk, round(s.ttft_s, 5),
                round(s.e2e_s, 5)]  # fmt: skip

    return {
        "machine": machine(),
        "model": options.model_path.name,
        "dtype": options.dtype,
        "load": options.load,
        "concurrency": options.concurrency,
        "gap_s": options.gap,
        "seed": options.seed,
        "shape": asdict(shape),
        "pools_tokens": asdict(sizes),
        "systems": rows,
        "sample_fields": ["turn", "prompt_tokens", "device", "host", "disk", "ttft_s", "e2e_s"],
        "runs": [
            {
                "system": run.system,
                "repeat": run.repeat,
                "seconds": run.seconds,
                "start_seconds": run.start_seconds,
                "samples": [sample(s) for s in run.samples],
            }
            for run in runs
        ],
    }


def headline(options: argparse.Namespace, sizes: Sizes, shape: Shape) -> str:
    return (
        f"{options.load}: {shape.conversations} conversations x {shape.turns} turns, prompts of "
        f"{shape.prompt_tokens(0):,} to {shape.prompt_tokens(shape.turns - 1):,} tokens, "
        f"{shape.answer_tokens} answer tokens, concurrency {options.concurrency}; device "
        f"{sizes.device:,} tokens, host {sizes.host:,}, working set {shape.working_set_tokens:,}; "
        f"{options.model_path.name}, {options.dtype}, page {sizes.page}; {machine()}."
    )


def output_path(options: argparse.Namespace) -> Path:
    name = f"multiturn_{options.load}_c{options.concurrency}"
    path: Path = options.output or RESULTS / name
    return path


def write(
    options: argparse.Namespace, sizes: Sizes, shape: Shape, runs: Sequence[Run], text: str
) -> str:
    """Writes what has been measured so far; returns the table with its headline."""
    per_linear = attention_per_linear(model_of(options.model_path))
    names = [name for name in options.systems if any(run.system == name for run in runs)]
    by_name = {name: [run for run in runs if run.system == name] for name in names}
    rows = [row(by_name[name], by_name.get("limit"), per_linear) for name in names]
    output = output_path(options)
    output.parent.mkdir(parents=True, exist_ok=True)
    document = as_json(options, sizes, shape, rows, runs)
    output.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    repeats = "1 repeat" if options.repeats == 1 else f"{options.repeats} repeats"
    report = (
        f"{text}\nTTFT of the turns after the first, {repeats}. By request: the median of each "
        f"request's TTFT over that of the same request with the limit.\n\n{table(rows)}\n"
    )
    output.with_suffix(".md").write_text(report)
    plot(rows, runs, options.load, output.with_suffix(".png"))
    return report


def main() -> int:
    options = arguments()
    fields = dict(SHAPES[options.load])
    if options.turns:
        fields["turns"] = options.turns
    shape = Shape(options.conversations, answer_tokens=options.answer_tokens, **fields)
    sizes = pool_sizes(options, shape)
    load = Load(shape, options.concurrency, options.gap, options.seed)
    text = headline(options, sizes, shape)
    print(text, file=sys.stderr)

    logs = Path(tempfile.mkdtemp(prefix="tiered_kv_bench_logs_"))
    print(f"logs: {logs}", file=sys.stderr)
    runs: list[Run] = []
    with (
        tempfile.TemporaryDirectory(prefix="tiered_kv_bench_", dir=options.scratch) as scratch,
        servers_up(
            servers(options, sizes, Path(scratch), logs), lambda server: warm_up(server.url, load)
        ) as up,
    ):
        for repeat in range(options.repeats):
            # Other conversations each time: nothing of an earlier repeat is found on a disk.
            runs += measure(up, replace(load, seed=options.seed + repeat), repeat)
            # After every repeat: an hour's work shouldn't be lost to a Ctrl-C.
            report = write(options, sizes, shape, runs, text)
    print(f"\n{report}\nwritten: {output_path(options)}.json, .md, .png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
