"""What each page format costs in quality, and saves in bytes. Prints a table, and writes it.

    python benchmark/quality/kv_formats.py --model-path MODEL
    python benchmark/quality/kv_formats.py --model-path MODEL --dtype bfloat16 --prompts 40

The KV of a text, in three parts, is computed once, and its whole pages are taken through each
format by the ops that the server's copies call (`sgl_kernel_ext`). Then the model goes on from
there, with everything else exact, as it does after a host or disk hit:

perplexity   of the stretches of each part that follow a page boundary, all before it from the pages
agreement    of greedy answers to prompts that end somewhere in a part, all but their last, broken
             page from the pages: which share is equal to raw's for 32 tokens, and how long they
             agree on average

An answer agrees up to the first token that differs, so one forward pass over raw's answer tells how
far: up to there both have the same input. `raw` is the control: it must lose nothing in float32;
in bfloat16 it says what rounding alone does.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from formats_model import FormatModel, Text, ThroughFormat, kv_through
from formats_report import FormatResult, Report, table
from tqdm import tqdm

from sgl_kernel_ext.formats import Format

ROOT = Path(__file__).parents[2]
TEXT = ROOT / "test" / "support" / "texts" / "tide_mill.txt"
RESULTS = ROOT / "benchmark" / "results"
#: Tokens of the text that are scored after each page boundary, and between two such boundaries.
STRETCH_TOKENS = 256
ANSWER_TOKENS = 32
#: (mean negative log-likelihood, best tokens) of a stretch.
Scored = tuple[float, list[int]]
#: Answers of raw that are generated at once.
BATCH = 8
#: The text is read as so many, each from its own beginning: a cache is copied as it grows.
PARTS = 3


def arguments() -> argparse.Namespace:
    about, *rest = (__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser(
        description=about,
        epilog="\n\n".join(rest),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model-path", type=Path, required=True, help="a Llama-like model's folder")
    add("--text", type=Path, default=TEXT, help="default: the test-suite's own")
    add("--dtype", choices=("float32", "bfloat16"), default="float32",
        help="of the model and its KV (default: float32)")  # fmt: skip
    add("--page-size", type=int, default=64)
    add("--prompts", type=int, default=200, help="for the agreement (default: 200)")
    add("--stretches", type=int, help="score only so many stretches of each part (default: all)")
    add("--minutes", type=float, default=10,
        help="ask no more prompts after so many (default: 10)")  # fmt: skip
    add("--threads", type=int, help="of torch (default: one per core)")
    add("--out", type=Path, help="default: benchmark/results/kv_formats_DTYPE.{json,md}")
    return parser.parse_args()


def boundaries(n_tokens: int, page_size: int) -> list[int]:
    """Where scored stretches begin: page boundaries with a whole stretch behind them."""
    step = -(-STRETCH_TOKENS // page_size) * page_size
    return list(range(step, n_tokens - STRETCH_TOKENS + 1, step))


def prompt_ends(n_prompts: int, n_tokens: int, page_size: int) -> list[int]:
    """Where prompts of two whole pages and more end: up to a quarter of a page past the last."""
    n_pages = n_tokens // page_size
    first, tails = 2, max(1, page_size // 4)
    ends = []
    for i in range(n_prompts):
        page = first + i * (n_pages - first) // n_prompts
        ends.append(page * page_size + 1 + i * 5 % tails)
    return ends


def batches(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for at in range(0, len(items), size):
        yield items[at : at + size]


@dataclass(frozen=True)
class Part:
    """A part of the text, its pages through each format, and what is measured of them."""

    text: Text
    through: dict[Format, ThroughFormat]
    starts: list[int]
    ends: list[int]


def read_parts(model: FormatModel, options: argparse.Namespace) -> list[Part]:
    parts = []
    for i, text in enumerate(model.read(options.text.read_text(), PARTS)):
        through = {f: kv_through(f, options.page_size, text) for f in Format}
        # The first parts have one more if the prompts cannot be divided.
        n_prompts = len(range(i, options.prompts, PARTS))
        ends = prompt_ends(n_prompts, text.n_tokens, options.page_size)
        starts = boundaries(text.n_tokens, options.page_size)
        parts.append(Part(text, through, starts[: options.stretches], ends))
    return parts


def score(model: FormatModel, parts: Sequence[Part]) -> dict[Format, list[Scored]]:
    scored: dict[Format, list[Scored]] = {f: [] for f in Format}
    n_passes = len(Format) * sum(len(part.starts) for part in parts)
    with tqdm(total=n_passes, desc="perplexity", unit=" stretches") as bar:
        for part in parts:
            for start in part.starts:
                for f in Format:
                    end = start + STRETCH_TOKENS
                    scored[f].append(model.score(part.through[f], start, end))
                    bar.update()
    return scored


def compare_answers(
    model: FormatModel, parts: Sequence[Part], page_size: int, stop_at_s: float
) -> dict[Format, list[int]]:
    """How long each prompt's answers agree; of as many prompts as there is time for.

    In random order, so that those there was time for are spread over the text.
    """
    agreed: dict[Format, list[int]] = {f: [] for f in Format}
    groups = [(part, group) for part in parts for group in batches(part.ends, BATCH)]
    random.Random(0).shuffle(groups)
    with tqdm(total=sum(len(group) for _, group in groups), desc="answers", unit=" prompts") as bar:
        for part, group in groups:
            if agreed[Format.RAW] and time.perf_counter() > stop_at_s:
                break
            answers = model.generate(part.text, group, ANSWER_TOKENS)
            for end, answer in zip(group, answers, strict=True):
                for f in Format:
                    agreed[f].append(model.agreeing_tokens(part.through[f], end, answer, page_size))
                bar.update()
    return agreed


def measure(options: argparse.Namespace) -> Report:
    stop_at_s = time.perf_counter() + 60 * options.minutes
    model = FormatModel(options.model_path, getattr(torch, options.dtype))
    parts = read_parts(model, options)
    scored = score(model, parts)
    agreed = compare_answers(model, parts, options.page_size, stop_at_s)
    results = []
    for f in Format:
        pages = [part.through[f] for part in parts]
        results.append(
            FormatResult(
                str(f),
                pages[0].token_bytes,
                sum(through.key_error for through in pages) / len(pages),
                sum(through.value_error for through in pages) / len(pages),
                [loss for loss, _ in scored[f]],
                [best for _, best in scored[f]],
                agreed[f],
            )
        )
    return Report(
        model=options.model_path.name,
        dtype=options.dtype,
        text=options.text.name,
        text_tokens=sum(part.text.n_tokens for part in parts),
        page_size=options.page_size,
        stretch_tokens=STRETCH_TOKENS - 1,
        answer_tokens=ANSWER_TOKENS,
        n_stretches=len(scored[Format.RAW]),
        n_prompts=len(agreed[Format.RAW]),
        results=results,
    )


def main() -> None:
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    began = time.perf_counter()
    with torch.inference_mode():
        report = measure(options)
    report.seconds = time.perf_counter() - began
    out = options.out or RESULTS / f"kv_formats_{options.dtype}"
    text = table(report, f"python benchmark/quality/kv_formats.py {command(options)}")
    out.with_suffix(".json").write_text(json.dumps(report.as_dict(), indent=1) + "\n")
    out.with_suffix(".md").write_text(text)
    print(text)


def command(options: argparse.Namespace) -> str:
    words = ["--model-path", options.model_path.name, "--dtype", options.dtype]
    words += ["--prompts", str(options.prompts), "--page-size", str(options.page_size)]
    words += ["--minutes", f"{options.minutes:g}"]
    if options.stretches is not None:
        words += ["--stretches", str(options.stretches)]
    return " ".join(words)


if __name__ == "__main__":
    main()
