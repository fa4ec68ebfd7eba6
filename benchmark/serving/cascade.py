"""Time of a decode iteration on a server: with cascade attention, without, and plain SGLang.

Three servers with the same model stay up and take turns at every case, because few machines keep
their speed: "plain" is SGLang without the plugin, "off" is --tiered-kv --tiered-kv-cascade off, and
"on" is --tiered-kv-cascade on. The requests of a case share the first tokens of their prompts and
arrive together; what is cached of them is all but a token, so that a turn's time is decoding. An
iteration's time is that of a generation of many tokens less that of one token, per token; medians
over the turns, ratios within them. Writes NAME.json and NAME.md.

On a GPU all three have CUDA graphs and FlashInfer's attention, and all three have to fit into its
memory. With --dummy the model's folder needs a config.json only, and its weights are random.

Example: python -m benchmark.serving.cascade --model ~/.cache/tiered_kv/models/SmolLM2-135M-Instruct
         python -m benchmark.serving.cascade --device cuda --dtype bfloat16 --model LLAMA_8B \\
             --rows 8 32 128 --shared 512 2048 8192 32768 --out benchmark/results/cascade_gpu
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmark.command_line import RESULTS, parser_of
from harness.metrics import scrape
from harness.server import BASE_ARGS, Server
from harness.servers import servers_up
from tiered_kv.metrics import names

TIERED = ("--tiered-kv", "--tiered-kv-disk-dir", "none", "--tiered-kv-host-size", "256MB")
SYSTEMS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "off": (*TIERED, "--tiered-kv-cascade", "off"),
    "on": (*TIERED, "--tiered-kv-cascade", "on"),
}
#: No warm-up: with dummy weights and no tokenizer there is nothing to say. No graphs for prefill:
#: what is timed is decoding.
GPU_ARGS = ("--attention-backend", "flashinfer", "--sampling-backend", "pytorch",
            "--grammar-backend", "none", "--mm-feature-transport", "cpu",
            "--skip-server-warmup", "--disable-prefill-cuda-graph")  # fmt: skip
FIRST_TOKEN, LAST_TOKEN = 1000, 40000
#: Tokens of context, over all rows and iterations, that a turn should about attend to.
TURN_TOKENS = 150_000
#: At least so many: the first ones may run before all rows have been prefilled.
ITERATIONS_MIN = 8
#: On a GPU they take milliseconds.
GPU_ITERATIONS = 64


def servers(options: argparse.Namespace, logs: str) -> dict[str, Server]:
    """All three, not started yet. logs: what the names of their logs begin with."""
    most = max(shared + rows * (options.own + GPU_ITERATIONS) for rows, shared in options.cases)
    common = [*(BASE_ARGS if options.device == "cpu" else GPU_ARGS), "--dtype", options.dtype]
    common += ["--page-size", "1", "--enable-metrics", "--max-total-tokens", str(2 * most)]
    common += ["--max-running-requests", str(max(64, *(rows for rows, _ in options.cases)))]
    if options.device == "cuda":
        sizes = sorted({1, *(rows for rows, _ in options.cases)})
        common += ["--cuda-graph-bs-decode", *map(str, sizes)]
    if options.dummy:
        common += ["--load-format", "dummy", "--skip-tokenizer-init"]
    # Only the CPU platform: without it SGLang does not serve on a plain CPU.
    env = {"plain": {"SGLANG_PLUGINS": "tiered_kv_cpu"}}
    return {
        name: Server(
            [*common, *flags], Path(f"{logs}{name}.log"), options.model, env=env.get(name, {})
        )
        for name, flags in SYSTEMS.items()
    }


def generate(server: Server, prompts: list[list[int]], n_new: int) -> tuple[float, list[Any]]:
    """Seconds, and the ids of every answer."""
    sampling = {"temperature": 0, "max_new_tokens": n_new, "ignore_eos": True}
    start = time.perf_counter()
    response = server.post(
        "/generate", {"input_ids": prompts, "sampling_params": sampling}, timeout_s=1200.0
    )
    seconds = time.perf_counter() - start
    response.raise_for_status()
    return seconds, [answer["output_ids"] for answer in response.json()]


def measure(
    up: dict[str, Server], options: argparse.Namespace, n_rows: int, n_shared: int
) -> dict[str, Any]:
    rng = random.Random(f"{n_rows} {n_shared}")

    def ids(n: int) -> list[int]:
        return [rng.randint(FIRST_TOKEN, LAST_TOKEN) for _ in range(n)]

    trunk = ids(n_shared)
    prompts = [trunk + ids(options.own) for _ in range(n_rows)]
    iterations = GPU_ITERATIONS
    if options.device == "cpu":
        most = TURN_TOKENS // (n_rows * (n_shared + options.own))
        iterations = max(ITERATIONS_MIN, min(24, most))
    for server in up.values():
        generate(server, prompts[:1], 1)
        generate(server, prompts, 1)
    turns: dict[str, list[float]] = {name: [] for name in up}
    outputs = {}
    before = decoded(up["on"])
    for _ in range(options.turns):
        for name, server in up.items():
            one, _ = generate(server, prompts, 1)
            many, outputs[name] = generate(server, prompts, 1 + iterations)
            turns[name].append(1e3 * (many - one) / iterations)
    attended, read = (b - a for a, b in zip(before, decoded(up["on"]), strict=True))

    def ratio(slow: str, fast: str) -> float:
        return statistics.median(s / f for s, f in zip(turns[slow], turns[fast], strict=True))

    pairs = zip(outputs["plain"], outputs["on"], strict=True)
    return {
        "rows": n_rows,
        "shared": n_shared,
        "iterations": iterations,
        **{f"{name}_ms": statistics.median(times) for name, times in turns.items()},
        "plain_by_on": ratio("plain", "on"),
        "off_by_on": ratio("off", "on"),
        "off_by_plain": ratio("off", "plain"),
        "read_share": read / max(attended, 1),
        "equal_answers": sum(theirs == ours for theirs, ours in pairs),
        "turns_ms": turns,
    }


def decoded(server: Server) -> tuple[float, float]:
    """Tokens that decoding attended to, and those that it read, so far."""
    now = scrape(server)
    return now.of(names.DECODE_CONTEXT_TOKENS), now.of(names.DECODE_READ_TOKENS)


def table(results: list[dict[str, Any]]) -> str:
    head = "| rows | shared | plain, ms | off, ms | on, ms | plain / on | off / on | read | equal |"
    lines = [head, "|---" * 9 + "|"]
    for row in results:
        lines.append(
            f"| {row['rows']} | {row['shared']} | {row['plain_ms']:.0f} | {row['off_ms']:.0f} "
            f"| {row['on_ms']:.0f} | {row['plain_by_on']:.2f} | {row['off_by_on']:.2f} "
            f"| {row['read_share']:.2f} | {row['equal_answers']} of {row['rows']} |"
        )
    return "\n".join(lines)


def report(options: argparse.Namespace, results: list[dict[str, Any]]) -> str:
    return f"""# Cascade attention on a {"CPU" if options.device == "cpu" else "GPU"} server

Time of a decode iteration of {options.model.name} in {options.dtype}, {options.own} tokens of each
request's own, {options.turns} turns, on {options.machine}. plain:
SGLang; off: --tiered-kv without cascade attention; on: with it. Ratios are medians of those within
a turn. read: tokens read per token attended to. equal: answers with the same ids as plain SGLang's.
{options.note}

{table(sorted(results, key=lambda row: (row["shared"], row["rows"])))}

    python -m benchmark.serving.cascade --device {options.device} \\
        --cases {" ".join(f"{rows}x{shared}" for rows, shared in options.cases)} \\
        --own {options.own} --turns {options.turns}
"""


def case(text: str) -> tuple[int, int]:
    """ "64x8192": rows and shared tokens."""
    rows, shared = map(int, text.split("x"))
    return rows, shared


def main() -> None:
    parser = parser_of("benchmark.serving.cascade", __doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 8, 16, 32], help="batch sizes")
    parser.add_argument(
        "--shared", type=int, nargs="+", default=[256, 1024, 4096], help="shared tokens"
    )
    parser.add_argument(
        "--cases", type=case, nargs="+", metavar="ROWSxSHARED",
        help="these pairs, in this order, instead of all of --rows and --shared",
    )  # fmt: skip
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dummy", action="store_true", help="random weights and no tokenizer")
    parser.add_argument("--own", type=int, default=64, help="tokens of each request's own")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--turns", type=int, default=3, help="measurements of each")
    parser.add_argument(
        "--logs", metavar="PREFIX",
        help="keep the servers' logs, in files whose names begin so (default: they are lost)",
    )  # fmt: skip
    parser.add_argument("--note", default="", help="a sentence on the machine, for the report")
    parser.add_argument("--out", type=Path, default=RESULTS / "cascade_cpu", metavar="NAME")
    options = parser.parse_args()
    if options.device == "cuda" and options.dtype == "float32":
        parser.error("FlashInfer has no kernels for float32; give --dtype bfloat16.")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; give --device cpu.")
    if options.device == "cuda":
        options.machine = torch.cuda.get_device_name()
    else:
        options.machine = f"{platform.machine()} with {len(os.sched_getaffinity(0))} cores"
    results: list[dict[str, Any]] = []
    # The quickest first: a run that is broken off keeps what it has.
    options.cases = options.cases or sorted(
        itertools.product(options.rows, options.shared), key=math.prod
    )
    with (
        tempfile.TemporaryDirectory(prefix="cascade_") as folder,
        servers_up(
            servers(options, options.logs or f"{folder}/"), at_once=options.device == "cuda"
        ) as up,
    ):
        for n_rows, n_shared in tqdm(options.cases, desc="cases"):
            results.append(measure(up, options, n_rows, n_shared))
            # After every case: what was measured is kept if the rest fails.
            options.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
            options.out.with_suffix(".md").write_text(report(options, results))
    print(table(results))


if __name__ == "__main__":
    main()
