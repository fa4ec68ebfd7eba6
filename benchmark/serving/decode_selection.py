"""Who decodes: all running requests in every iteration, or those whose tokens are due.

    python -m benchmark.serving.decode_selection --model-path MODEL
    python -m benchmark.serving.decode_selection ... --prefix-tokens 512 --new-tokens 16   to try it

Gangs of requests share a prefix that is cached before; then all of them arrive at once. A few,
spread over the gangs, are interactive and were promised a token every so often; the others are
batch requests, which were promised a slower mean pace. All servers are up, one of them works; they
take turns:

  plain     SGLang without our cache
  all       --tiered-kv, everyone decodes in every iteration
  slack     --tiered-kv, --tiered-kv-iteration-policy slack

Objectives are shares of the pace of `plain` in the same turn (few machines keep their speed):
interactive --interactive-share of its median time between tokens, batch --batch-share of it as a
mean. The same load with one class only, which was promised --loose-share of that pace, shows what
choosing costs where there is no reason to. Ratios are taken within a turn, and their median over
all turns. Answers are compared with `plain`'s. Before all that each of our servers decodes 64
tokens of the same requests: a server that has just started predicts iterations by its preset, and
learns how long they really take from the first dozens of them.

The price is stated beside what the bytes say: an iteration reads the weights and every chosen
request's KV, so decoding fewer at a time reads the weights more often per token.

Prints a table and writes it with all samples to benchmark/results/decode_selection.{md,json}. Needs
a machine without an accelerator, and a quiet one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import requests
from tqdm import tqdm

from benchmark.command_line import RESULTS, parser_of
from benchmark.serving.multiturn_report import machine
from benchmark.serving.streams import pieces
from benchmark.serving.systems import model_of
from harness.prompts import PromptMaker
from harness.server import BASE_ARGS, Server
from harness.servers import servers_up

TIERED = ("--tiered-kv", "--tiered-kv-disk-dir", "none", "--tiered-kv-iteration-policy")
SYSTEMS = {"plain": (), "all": (*TIERED, "all"), "slack": (*TIERED, "slack")}


@dataclass(frozen=True)
class Asked:
    """One request of the load. tbt_ms: what it is promised."""

    prompt: tuple[int, ...]
    is_interactive: bool
    tbt_ms: float | None


@dataclass(frozen=True)
class Answer:
    """One answer. times_s: of its tokens, from the load's start."""

    is_interactive: bool
    times_s: tuple[float, ...]
    output_ids: tuple[int, ...]

    @property
    def gaps_s(self) -> list[float]:
        return [b - a for a, b in zip(self.times_s, self.times_s[1:], strict=False)]

    @property
    def mean_gap_s(self) -> float:
        return (self.times_s[-1] - self.times_s[0]) / max(1, len(self.times_s) - 1)


@dataclass
class Run:
    """One load on one server. pace_s: of `plain` in the same turn; asked and answers: in order."""

    system: str
    load: str
    repeat: int
    pace_s: float
    asked: Sequence[Asked]
    answers: list[Answer]
    decode_sizes: list[int]

    @property
    def seconds(self) -> float:
        return max(answer.times_s[-1] for answer in self.answers)

    @property
    def tokens_per_s(self) -> float:
        return sum(len(answer.output_ids) for answer in self.answers) / self.seconds

    def gaps_s(self, *, is_interactive: bool) -> list[float]:
        chosen = [a for a in self.answers if a.is_interactive is is_interactive]
        return [gap for answer in chosen for gap in answer.gaps_s]

    def interactive_gap_ms(self, percentile: float) -> float:
        """Between tokens of interactive requests; nan where there are none."""
        gaps = self.gaps_s(is_interactive=True)
        return float(np.percentile(gaps, percentile)) * 1e3 if gaps else float("nan")

    def batch_in_time(self) -> float:
        """Share of the other requests whose mean pace was what they were promised."""
        pairs = zip(self.answers, self.asked, strict=True)
        others = [(a, b) for a, b in pairs if not b.is_interactive and b.tbt_ms is not None]
        if not others:
            return float("nan")
        return statistics.mean(a.mean_gap_s * 1e3 <= (b.tbt_ms or 0) for a, b in others)


def arguments() -> argparse.Namespace:
    parser = parser_of("benchmark.serving.decode_selection", __doc__)
    add = parser.add_argument
    add("--model-path", type=Path, required=True)
    add("--gangs", type=int, default=4)
    add("--gang-size", type=int, default=4)
    add("--prefix-tokens", type=int, default=2048)
    add("--new-tokens", type=int, default=64)
    add("--repeats", type=int, default=3)
    add("--interactive", type=int, default=2, help="interactive requests (default: 2)")
    add("--interactive-share", type=float, default=0.45)
    add("--batch-share", type=float, default=5.0)
    add("--loose-share", type=float, default=3.0)
    add("--cascade", choices=("on", "off"), default="off",
        help="read shared KV once, in the systems that can (default: off)")  # fmt: skip
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--page-size", type=int, default=64)
    add("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    add(
        "--output",
        type=Path,
        default=RESULTS / "decode_selection",
        help="path of the results without suffix",
    )
    return parser.parse_args()


def prompts_of(options: argparse.Namespace) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """(the gangs' prefixes, all prompts gang by gang)"""
    maker = PromptMaker(options.model_path)
    prefixes = [maker.tokens(f"gang {i}", options.prefix_tokens) for i in range(options.gangs)]
    own = [maker.tokens(f"own {i}", 12 + 3 * i) for i in range(options.gang_size)]
    return prefixes, [(*prefix, *tail) for prefix in prefixes for tail in own]


def load_of(
    name: str, prompts: Sequence[tuple[int, ...]], pace_s: float | None, options: argparse.Namespace
) -> list[Asked]:
    """Who asks for what; without a pace, nobody is promised anything."""

    def promised(share: float) -> float | None:
        return None if pace_s is None else pace_s * share * 1e3

    if name == "one class":
        return [Asked(prompt, False, promised(options.loose_share)) for prompt in prompts]
    every = max(1, len(prompts) // max(1, options.interactive))
    asked = []
    for i, prompt in enumerate(prompts):
        is_interactive = i % every == 0 and i // every < options.interactive
        share = options.interactive_share if is_interactive else options.batch_share
        asked.append(Asked(prompt, is_interactive, promised(share)))
    return asked


def stream(server: Server, asked: Asked, new_tokens: int, began: float) -> Answer:
    sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    body: dict[str, Any] = {
        "input_ids": list(asked.prompt), "sampling_params": sampling, "stream": True,
    }  # fmt: skip
    if asked.tbt_ms is not None:
        name = "interactive" if asked.is_interactive else "batch"
        body["slo"] = {"class": name, "ttft_ms": 60_000, "tbt_ms": asked.tbt_ms}
    times: list[float] = []
    n_seen, ids = 0, ()
    for now_s, answer in pieces(server.url, body):
        ids = tuple(answer["output_ids"])
        n_tokens = answer["meta_info"]["completion_tokens"]
        times += [round(now_s - began, 5)] * (n_tokens - n_seen)
        n_seen = n_tokens
    if len(times) != new_tokens:
        raise RuntimeError(f"{len(times)} tokens came instead of {new_tokens}")
    return Answer(asked.is_interactive, tuple(times), ids)


def serve(
    server: Server, asked: Sequence[Asked], new_tokens: int
) -> tuple[list[Answer], list[int]]:
    """All of them at once; the answers, and how many requests decoded in each iteration."""
    before = len(server.decode_sizes())
    answers: list[Answer | None] = [None] * len(asked)
    errors: list[BaseException] = []
    began = time.perf_counter()

    def one(i: int) -> None:
        try:
            answers[i] = stream(server, asked[i], new_tokens, began)
        except (requests.RequestException, RuntimeError) as error:
            errors.append(error)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    done = [answer for answer in answers if answer is not None]
    return done, server.decode_sizes()[before:]


def server_of(system: str, options: argparse.Namespace, folder: Path) -> Server:
    n_tokens = options.gangs * (
        options.prefix_tokens + options.gang_size * (options.new_tokens + 4 * options.page_size)
    )
    flags: list[object] = [
        *BASE_ARGS, "--dtype", options.dtype, "--page-size", options.page_size,
        "--max-total-tokens", 2 * n_tokens, "--chunked-prefill-size", 512,
        "--decode-log-interval", 1, *SYSTEMS[system],
    ]  # fmt: skip
    if system != "plain":
        flags += ["--tiered-kv-cascade", options.cascade]
    return Server([str(flag) for flag in flags], folder / f"{system}.log", options.model_path)


def cache(prefixes: Sequence[tuple[int, ...]], server: Server) -> None:
    for prefix in prefixes:
        stream(server, Asked(prefix, False, None), 1, time.perf_counter())


def bytes_price(run: Run, plain: Run, options: argparse.Namespace) -> float:
    """Throughput as a share of `plain`'s if an iteration takes what it reads."""
    element_bytes = 4 if options.dtype == "float32" else 2
    model = model_of(options.model_path, element_bytes)
    weights = float(model.n_parameters * element_bytes)
    kv = float(model.kv_bytes_per_token * (options.prefix_tokens + options.new_tokens / 2))

    def bytes_per_token(one: Run) -> float:
        return weights * len(one.decode_sizes) / sum(one.decode_sizes) + kv

    return bytes_per_token(plain) / bytes_per_token(run)


def row(runs: Sequence[Run], plain: Sequence[Run], options: argparse.Namespace) -> str:
    """One line of the table: medians over the turns, ratios within them."""

    def median(of: Callable[[Run], float]) -> float:
        return statistics.median(of(run) for run in runs)

    def ratio(of: Callable[[Run], float]) -> float:
        pairs = zip(runs, plain, strict=True)
        return statistics.median(of(ours) / of(theirs) for ours, theirs in pairs)

    def ids(run: Run) -> list[tuple[int, ...]]:
        return [answer.output_ids for answer in run.answers]

    equal = all(ids(run) == ids(plain[0]) for run in runs)
    pairs = zip(runs, plain, strict=True)
    price = statistics.median(bytes_price(ours, theirs, options) for ours, theirs in pairs)
    in_time = "" if runs[0].system == "plain" else f"{median(Run.batch_in_time):.0%}"
    return (
        f"| {runs[0].load} | {runs[0].system} | {median(lambda r: r.interactive_gap_ms(50)):.0f} "
        f"| {median(lambda r: r.interactive_gap_ms(99)):.0f} "
        f"| {ratio(lambda r: r.interactive_gap_ms(99)):.2f} | {in_time} "
        f"| {median(lambda r: r.tokens_per_s):.1f} | {ratio(lambda r: r.tokens_per_s):.2f} "
        f"| {price:.2f} | {median(lambda r: statistics.mean(r.decode_sizes)):.1f} "
        f"| {'yes' if equal else 'NO'} |"
    ).replace("nan", "")


HEAD = (
    "| load | system | interactive TBT p50 ms | p99 ms | p99 by plain's | batch in time | tokens/s "
    "| by plain's | what the bytes say | mean decode batch | same answers |\n" + "|---" * 11 + "|"
)
LOADS = ("two classes", "one class")
#: Two times what the cost model learns from at once.
LEARNED_TOKENS = 64


def one_turn(
    up: dict[str, Server], load: str, prompts: Sequence[tuple[int, ...]], repeat: int, options: Any
) -> Iterator[Run]:
    """`plain` first: nobody is promised anything there, its pace is what the others promise."""
    unpromised = load_of(load, prompts, None, options)
    answers, sizes = serve(up["plain"], unpromised, options.new_tokens)
    pace_s = statistics.median(gap for answer in answers for gap in answer.gaps_s)
    yield Run("plain", load, repeat, pace_s, unpromised, answers, sizes)
    others = [name for name in up if name != "plain"]
    for name in others if repeat % 2 == 0 else others[::-1]:
        asked = load_of(load, prompts, pace_s, options)
        yield Run(name, load, repeat, pace_s, asked, *serve(up[name], asked, options.new_tokens))


def main() -> int:
    options = arguments()
    prefixes, prompts = prompts_of(options)
    systems = ["plain", *(name for name in options.systems if name != "plain")]
    runs: list[Run] = []
    total = len(systems) * options.repeats * len(LOADS)
    with (
        tempfile.TemporaryDirectory() as scratch,
        servers_up(
            {name: server_of(name, options, Path(scratch)) for name in systems},
            partial(cache, prefixes),
        ) as up,
        tqdm(total=total, unit="load") as bar,
    ):
        for name in systems[1:]:
            bar.set_description(f"{name} learns")
            serve(up[name], load_of("one class", prompts, None, options), LEARNED_TOKENS)
        for repeat in range(options.repeats):
            for load in LOADS:
                bar.set_description(load)
                for run in one_turn(up, load, prompts, repeat, options):
                    runs.append(run)
                    bar.update()
            # After every repeat: what was measured is kept if the rest fails.
            write(runs, systems, options)
    return 0


def write(runs: Sequence[Run], systems: Sequence[str], options: argparse.Namespace) -> None:
    lines = [HEAD]
    for load in LOADS:
        of_load = [run for run in runs if run.load == load]
        plain = [run for run in of_load if run.system == "plain"]
        for system in systems:
            lines.append(row([run for run in of_load if run.system == system], plain, options))
    told = {name: str(value) for name, value in vars(options).items() if name != "output"}
    told["model_path"] = options.model_path.name
    paces = ", ".join(f"{run.pace_s * 1e3:.0f}" for run in runs if run.system == "plain")
    about = (
        f"{options.gangs} gangs of {options.gang_size}, {options.prefix_tokens} tokens shared, "
        f"{options.interactive} requests interactive, "
        f"{options.new_tokens} new tokens each, {options.dtype}, cascade {options.cascade}; pace "
        f"of plain, turn by turn: {paces} ms. Promised, as shares of it: interactive "
        f"{options.interactive_share}, batch {options.batch_share} as a mean, one class "
        f"{options.loose_share}. Medians of {runs[-1].repeat + 1} repeats. {machine()}."
    )
    text = "\n".join(lines)
    print(f"\n{about}\n\n{text}")
    options.output.with_suffix(".md").write_text(f"# Who decodes\n\n{about}\n\n{text}\n")
    samples = [
        {
            "system": run.system,
            "load": run.load,
            "repeat": run.repeat,
            "pace_s": run.pace_s,
            "decode_sizes": run.decode_sizes,
            "answers": [asdict(answer) for answer in run.answers],
        }
        for run in runs
    ]
    options.output.with_suffix(".json").write_text(
        json.dumps({"options": told, "machine": machine(), "runs": samples}) + "\n"
    )


if __name__ == "__main__":
    sys.exit(main())
