"""Prompts that arrive in pieces, against the same prompts sent when all of it is there.

    python -m benchmark.serving.pieces --model-path MODEL

A caller retrieves documents one after the other, and all of that takes as long as the server takes
to prefill them (--retrieval times as long). Then comes the question, which is answered with one
token. Each prompt is new. In turns, in an order drawn anew:

  whole     the request is sent when everything is there
  pieces    a prompt is opened with the first document, each is appended when it comes, and it is
            finished with the question

TTFT is counted from when the last document is there; the whole task from the beginning. Ratios are
taken within a turn. One server with --tiered-kv; how long prefill takes is what `whole` took in the
turn before.

Prints a table and writes it with all samples to benchmark/results/pieces.{md,json}.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import requests
from tqdm import tqdm

from benchmark.command_line import RESULTS, parser_of
from benchmark.serving.multiturn_report import machine
from harness.prompts import PromptMaker
from harness.server import BASE_ARGS, Server

SAMPLING = {"temperature": 0, "max_new_tokens": 1}
QUESTION_TOKENS = 32
TIMEOUT_S = 300.0

Ended = tuple[float, dict[str, Any]]
"""(time.perf_counter when all documents were there, the answer)."""


@dataclass(frozen=True)
class Sample:
    """One task. Seconds; cached: tokens of the prompt that were there when it was finished."""

    way: str
    turn: int
    retrieval_s: float
    ttft_s: float
    task_s: float
    cached: int
    output_ids: tuple[int, ...]


def arguments() -> argparse.Namespace:
    parser = parser_of("benchmark.serving.pieces", __doc__)
    add = parser.add_argument
    add("--model-path", type=Path, required=True)
    add("--prompt-tokens", type=int, default=2048)
    add("--documents", type=int, default=8)
    add("--retrieval", type=float, default=1.0, help="its time, of that of prefill (default: 1)")
    add("--turns", type=int, default=8)
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    default = RESULTS / "pieces"
    add("--output", type=Path, default=default, help="path of the results without suffix")
    return parser.parse_args()


def documents(prompt: Sequence[int], n: int) -> list[list[int]]:
    """`prompt` without the question, in `n` parts of equal length."""
    rest = list(prompt[:-QUESTION_TOKENS])
    size = -(-len(rest) // n)
    return [rest[i : i + size] for i in range(0, len(rest), size)]


def _answer(response: requests.Response) -> dict[str, Any]:
    response.raise_for_status()
    found: dict[str, Any] = response.json()
    return found


def whole(url: str, parts: Sequence[list[int]], question: list[int], gap_s: float) -> Ended:
    for _ in parts:
        time.sleep(gap_s)
    there_s = time.perf_counter()
    prompt = [token for part in parts for token in part] + question
    body = {"input_ids": prompt, "sampling_params": SAMPLING}
    return there_s, _answer(requests.post(f"{url}/generate", json=body, timeout=TIMEOUT_S))


def in_pieces(url: str, parts: Sequence[list[int]], question: list[int], gap_s: float) -> Ended:
    prompts = f"{url}/tiered_kv/prompts"
    time.sleep(gap_s)
    body = {"input_ids": parts[0], "sampling_params": SAMPLING}
    prompt = _answer(requests.post(prompts, json=body, timeout=TIMEOUT_S))
    for part in parts[1:]:
        time.sleep(gap_s)
        _answer(
            requests.patch(f"{prompts}/{prompt['id']}", json={"input_ids": part}, timeout=TIMEOUT_S)
        )
    there_s = time.perf_counter()
    end = requests.post(
        f"{prompts}/{prompt['id']}/finish", json={"input_ids": question}, timeout=TIMEOUT_S
    )
    return there_s, _answer(end)


WAYS: dict[str, Callable[..., Ended]] = {"whole": whole, "pieces": in_pieces}


def task(
    way: str, turn: int, url: str, prompt: Sequence[int], n: int, retrieval_s: float
) -> Sample:
    parts, question = documents(prompt, n), list(prompt[-QUESTION_TOKENS:])
    begin_s = time.perf_counter()
    there_s, answer = WAYS[way](url, parts, question, retrieval_s / len(parts))
    end_s = time.perf_counter()
    cached, ids = answer["meta_info"]["cached_tokens"], tuple(answer["output_ids"])
    return Sample(way, turn, retrieval_s, end_s - there_s, end_s - begin_s, cached, ids)


def measure(options: argparse.Namespace, server: Server) -> list[Sample]:
    """In each turn each way has a prompt of its own; afterwards each answer is asked for again."""
    make, rng = PromptMaker(options.model_path), random.Random(1)
    found: list[Sample] = []
    prefill_s = 0.0
    for turn in tqdm(range(-1, options.turns), desc="turns"):
        for way in rng.sample(list(WAYS), len(WAYS)):
            prompt = make.tokens(f"{way} {turn}", options.prompt_tokens)
            retrieval_s = prefill_s * options.retrieval
            sample = task(way, turn, server.url, prompt, options.documents, retrieval_s)
            # Under a salt of its own, so that nothing of it is cached.
            body = {"input_ids": prompt, "sampling_params": SAMPLING, "cache_salt": "anew"}
            if sample.output_ids != tuple(_answer(server.post("/generate", body))["output_ids"]):
                raise SystemExit(f"{way}, turn {turn}: another answer than to the whole prompt.")
            if way == "whole":
                prefill_s = sample.ttft_s
            if turn >= 0:  # before, the server is cold and nobody knows what prefill takes
                found.append(sample)
    return found


def report(options: argparse.Namespace, samples: Sequence[Sample]) -> str:
    def median(way: str, key: str) -> float:
        return float(statistics.median(asdict(s)[key] for s in samples if s.way == way))

    def ratio(key: str) -> float:
        by_turn: dict[int, dict[str, float]] = {}
        for sample in samples:
            by_turn.setdefault(sample.turn, {})[sample.way] = asdict(sample)[key]
        return statistics.median(of["whole"] / of["pieces"] for of in by_turn.values())

    about = (
        f"{options.prompt_tokens:,} tokens in {options.documents} documents and a question of "
        f"{QUESTION_TOKENS} tokens; to retrieve them takes {options.retrieval:g} of the time that "
        f"prefill takes. {options.turns} turns, medians; ratios are those within a turn. TTFT is "
        "counted from when the last document is there. Each answer is the one to the same prompt "
        "computed anew."
    )
    lines = [
        "# Prompts that arrive in pieces",
        "",
        "Made by `python -m benchmark.serving.pieces`, on " + machine() + ".",
        "",
        about,
        "",
        "| sent | TTFT | whole task | of the prompt there at the end |",
        "| --- | --- | --- | --- |",
    ]
    for way in WAYS:
        ttft, total = median(way, "ttft_s"), median(way, "task_s")
        cached = median(way, "cached") / options.prompt_tokens
        lines.append(f"| {way} | {ttft * 1e3:,.0f} ms | {total:.2f} s | {cached:.0%} |")
    lines.append("")
    lines.append(f"TTFT {ratio('ttft_s'):.1f} times lower, the task {ratio('task_s'):.2f} times.")
    return "\n".join(lines) + "\n"


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory() as folder:
        flags = [*BASE_ARGS, "--dtype", options.dtype, "--chunked-prefill-size", 512]
        flags += ["--page-size", 64, "--max-total-tokens", 16 * options.prompt_tokens]
        flags += ["--tiered-kv", "--tiered-kv-disk-dir", "none"]
        log = Path(folder) / "server.log"
        with Server([*map(str, flags)], log, options.model_path) as server:
            samples = measure(options, server)
    text = report(options, samples)
    print(text)
    options.output.with_suffix(".md").write_text(text)
    rows = [asdict(sample) for sample in samples]
    options.output.with_suffix(".json").write_text(json.dumps(rows, indent=0) + "\n")


if __name__ == "__main__":
    main()
