"""How long programs in SGLang's frontend language take: as programs, and as single requests.

Two servers with the same model stay up: plain SGLang, and --tiered-kv. Each program is run on plain
SGLang, on --tiered-kv with SGLang's own RuntimeEndpoint, and there with ProgramEndpoint
(docs/frontend.md), in turns, because few machines keep their speed. Caches are emptied before every
run, texts are new in every turn, and answers are greedy and must be equal. Times are of whole
programs, their mean where several run at once; medians over the turns, ratios within them. Writes
NAME.json and NAME.md.

Example: python -m benchmark.serving.programs \\
             --model ~/.cache/tiered_kv/models/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sglang as sgl
from tqdm import tqdm

from benchmark.command_line import RESULTS, parser_of
from benchmark.serving.systems import plain_and_tiered
from harness.server import BASE_ARGS, Server
from harness.servers import servers_up
from tiered_kv.frontend.endpoint import ProgramEndpoint, pause

TIERED = ("--tiered-kv", "--tiered-kv-disk-dir", "none", "--page-size", "16")
SYSTEMS = {
    "plain": "plain SGLang",
    "requests": "--tiered-kv, SGLang's RuntimeEndpoint",
    "programs": "--tiered-kv, ProgramEndpoint, class batch",
}
WORDS = [
    *("amber", "basil", "cedar", "delta", "ember", "fjord", "grove", "harbor", "island"),
    *("juniper", "kettle", "lantern", "meadow", "nectar", "orchard", "pepper", "quartz"),
    *("river", "saddle", "timber", "umbrella", "valley", "willow", "yarrow", "zephyr"),
]


def words(name: str, n: int) -> str:
    rng = random.Random(name)
    return " ".join(rng.choice(WORDS) for _ in range(n))


def gen(name: str, n: int) -> Any:
    return sgl.gen(name, max_tokens=n, temperature=0, ignore_eos=True)


# SGLang wants a function's first parameter to be called `s`.


@sgl.function
def tree_of_thought(s: Any, name: str) -> None:
    """Twice: four ideas, then four marks for them; then the answer."""
    s += f"{words(name, 150)}\nQuestion: which of these words matter?\n"
    for depth in range(2):
        ideas = s.fork(4)
        ideas += lambda i: f"Idea {i + 1}:" + gen("idea", 12)
        s += "".join(f"Idea {i + 1}:{ideas[i]['idea']}\n" for i in range(4))
        marks = s.fork(4)
        marks += lambda i: f"Out of ten, idea {i + 1} deserves" + gen("mark", 3)
        s += "".join(f"Mark {i + 1}:{marks[i]['mark']}\n" for i in range(4))
        s += f"The best after round {depth + 1} is" + gen("best", 4)


@sgl.function
def map_reduce(s: Any, name: str) -> None:
    """A line on each of six documents, then one on all of them."""
    s += f"{words(name, 120)}\nThese were the rules for summaries.\n"
    parts = s.fork(6)
    parts += lambda i: f"Document: {words(f'{name} {i}', 30)}\nSummary:" + gen("summary", 8)
    s += "".join(f"Part {i + 1}:{parts[i]['summary']}\n" for i in range(6))
    s += "In one line:" + gen("all", 8)


@sgl.function
def agent(s: Any, name: str) -> None:
    """Five calls, with a tool of a second and a half between two of them."""
    s += f"{words(name, 250)}\nThese were the instructions for the agent.\n"
    for step in range(5):
        if step < 4:
            s += pause(1.5)
        s += f"Step {step + 1}:" + gen(f"step {step}", 8)
        if step < 4:
            # A tool's answer depends on the question.
            tool = f"{name} {step} {s[f'step {step}']}"
            time.sleep(1.5)
            s += f"\nTool: {words(tool, 20)}\n"


@dataclass(frozen=True)
class Case:
    """`n` programs at once."""

    name: str
    program: Any
    n: int


CASES = (
    Case("tree of thought", tree_of_thought, 1),
    Case("map-reduce", map_reduce, 1),
    Case("map-reduce", map_reduce, 3),
    Case("agent with tools", agent, 5),
)


def run(case: Case, backend: Any, turn: int) -> tuple[float, list[str]]:
    """Mean seconds until a program has ended, and what each had written."""

    def one(i: int) -> tuple[float, str]:
        start = time.perf_counter()
        text = case.program.run(name=f"{case.name} {turn} {i}", backend=backend).text()
        return time.perf_counter() - start, text

    with ThreadPoolExecutor(case.n) as pool:
        seconds, texts = zip(*pool.map(one, range(case.n)), strict=True)
    return statistics.mean(seconds), list(texts)


def measure(
    case: Case, systems: dict[str, tuple[Server, Any]], n_turns: int, progress: Callable[[], Any]
) -> dict[str, Any]:
    turns: dict[str, list[float]] = {name: [] for name in systems}
    equal = total = 0
    names = list(systems)
    for turn in range(n_turns + 1):
        texts = {}
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            server, backend = systems[name]
            server.flush_cache()
            seconds, texts[name] = run(case, backend, turn)
            # The first turn compiles and learns.
            if turn:
                turns[name].append(seconds)
        equal += sum(a == b for a, b in zip(texts["plain"], texts["programs"], strict=True))
        total += case.n
        progress()

    def ratio(slow: str) -> float:
        pairs = zip(turns[slow], turns["programs"], strict=True)
        return statistics.median(s / f for s, f in pairs)

    return {
        "case": case.name,
        "at_once": case.n,
        **{f"{name}_s": statistics.median(times) for name, times in turns.items()},
        "plain_by_programs": ratio("plain"),
        "requests_by_programs": ratio("requests"),
        "equal": equal,
        "total": total,
        "turns_s": turns,
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    head = "| program | at once | plain, s | requests, s | programs, s | plain / programs "
    lines = [head + "| requests / programs | equal |", "|---" * 8 + "|"]
    for row in results:
        lines.append(
            f"| {row['case']} | {row['at_once']} | {row['plain_s']:.2f} | {row['requests_s']:.2f} "
            f"| {row['programs_s']:.2f} | {row['plain_by_programs']:.2f} "
            f"| {row['requests_by_programs']:.2f} | {row['equal']} of {row['total']} |"
        )
    return "\n".join(lines)


def report(options: argparse.Namespace, results: Sequence[dict[str, Any]]) -> str:
    what = "; ".join(f"{name}: {text}" for name, text in SYSTEMS.items())
    only = f" --only {' '.join(options.only)}" if options.only else ""
    return f"""# Programs in SGLang's frontend language

Seconds until a program has ended, in the mean of those that run at once; medians of {options.turns}
turns, ratios within a turn. {options.model.name} in float32 on {platform.machine()} with
{len(os.sched_getaffinity(0))} cores, {options.device_tokens} tokens on the device. {what}.
equal: programs that wrote the same on plain SGLang and as programs.
{options.note}

{table(results)}

    python -m benchmark.serving.programs --turns {options.turns} \\
        --device-tokens {options.device_tokens}{only}
"""


def main() -> None:
    parser = parser_of("benchmark.serving.programs", __doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--turns", type=int, default=5, help="measurements of each")
    parser.add_argument("--device-tokens", type=int, default=2048, help="room for KV on the device")
    parser.add_argument(
        "--only", nargs="+", metavar="TEXT", help="cases whose name has one of these in it"
    )
    parser.add_argument("--note", default="", help="a sentence on the machine, for the report")
    parser.add_argument("--out", type=Path, default=RESULTS / "programs_cpu", metavar="NAME")
    options = parser.parse_args()
    only = options.only or [""]
    cases = [case for case in CASES if any(text in case.name for text in only)]
    common = [*BASE_ARGS, "--dtype", "float32", "--max-total-tokens", str(options.device_tokens)]
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="programs_") as folder:
        servers = plain_and_tiered(options.model, common, TIERED, Path(folder))
        with servers_up(servers) as up:
            plain, tiered = up["plain"], up["tiered"]
            systems = {
                "plain": (plain, sgl.RuntimeEndpoint(plain.url)),
                "requests": (tiered, sgl.RuntimeEndpoint(tiered.url)),
                "programs": (tiered, ProgramEndpoint(tiered.url, slo={"class": "batch"})),
            }
            with tqdm(total=len(cases) * (options.turns + 1), desc="turns") as bar:
                for case in cases:
                    results.append(measure(case, systems, options.turns, bar.update))
                    # After every case: what was measured is kept if the rest fails.
                    options.out.with_suffix(".json").write_text(
                        json.dumps(results, indent=1) + "\n"
                    )
                    options.out.with_suffix(".md").write_text(report(options, results))
    print(table(results))


if __name__ == "__main__":
    main()
