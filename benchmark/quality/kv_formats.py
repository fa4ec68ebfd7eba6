"""What each page format costs in quality, and saves in bytes. Prints a table, and writes it.

    python benchmark/quality/kv_formats.py --model-path MODEL
    python benchmark/quality/kv_formats.py --model-path MODEL --dtype bfloat16 --prompts 40

The KV of a text is computed once, and its whole pages are taken through each format by the ops that
the server's copies call (`sgl_kernel_ext`). Then the model goes on from there, as it does after a
host or disk hit, with everything else exact:

perplexity   of the stretches of the text that follow a page boundary, all before it from the pages
agreement    of greedy answers to prompts that end somewhere in the text, their whole pages from the
             pages: which share is equal to raw's for 32 tokens, and how long they agree on average

An answer agrees up to the first token that differs, so one forward pass over raw's answer tells how
far: up to there both have the same input. `raw` is the control: it must lose nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from formats_model import FormatModel, Text, kv_through
from formats_report import FormatResult, Report, table
from tqdm import tqdm

from sgl_kernel_ext.formats import Format

ROOT = Path(__file__).parents[2]
TEXT = ROOT / "test" / "support" / "texts" / "tide_mill.txt"
RESULTS = ROOT / "benchmark" / "results"
#: Tokens of the text that are scored after each page boundary, and between two such boundaries.
STRETCH_TOKENS = 256
ANSWER_TOKENS = 32
#: Answers of raw that are generated at once.
BATCH = 8


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
    add("--stretches", type=int, help="score only this many stretches (default: all)")
    add("--threads", type=int, help="of torch (default: one per core)")
    add("--out", type=Path, help="default: benchmark/results/kv_formats_DTYPE.{json,md}")
    return parser.parse_args()


def boundaries(n_tokens: int, page_size: int) -> list[int]:
    """Where scored stretches begin: page boundaries with a whole stretch behind them."""
    step = -(-STRETCH_TOKENS // page_size) * page_size
    return list(range(step, n_tokens - STRETCH_TOKENS + 1, step))


def prompt_ends(n_prompts: int, n_tokens: int, page_size: int) -> list[int]:
    """Where prompts end: spread over the text, one to a quarter of a page past a page boundary.

    A prompt has at least two whole pages, and its answer must lie where pages were converted too.
    """
    n_pages = (n_tokens - ANSWER_TOKENS) // page_size
    first, tails = 2, max(1, page_size // 4)
    ends = []
    for i in range(n_prompts):
        page = first + i * (n_pages - first) // n_prompts
        ends.append(page * page_size + 1 + i * 5 % tails)
    return ends


def batches(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for at in range(0, len(items), size):
        yield items[at : at + size]


def raw_answers(model: FormatModel, text: Text, ends: Sequence[int]) -> list[list[int]]:
    answers: list[list[int]] = []
    with tqdm(total=len(ends), desc="raw answers", unit=" prompts", disable=None) as bar:
        for group in batches(ends, BATCH):
            answers += model.generate(text, group, ANSWER_TOKENS)
            bar.update(len(group))
    return answers


def measure(options: argparse.Namespace) -> Report:
    model = FormatModel(options.model_path, getattr(torch, options.dtype))
    text = model.read(options.text.read_text())
    starts = boundaries(text.n_tokens, options.page_size)
    if options.stretches is not None:
        # Spread over the text: what follows a long prefix counts as well.
        starts = starts[:: max(1, len(starts) // options.stretches)][: options.stretches]
    ends = prompt_ends(options.prompts, text.n_tokens, options.page_size)
    answers = raw_answers(model, text, ends)
    results = []
    n_passes = len(Format) * (len(starts) + len(ends))
    with tqdm(total=n_passes, desc="formats", unit=" passes", disable=None) as bar:
        for format_ in Format:
            through = kv_through(format_, options.page_size, text)
            bar.set_postfix(format=str(format_))
            losses, best = [], []
            for start in starts:
                loss, top = model.score(through, start, start + STRETCH_TOKENS)
                losses.append(loss)
                best.append(top)
                bar.update()
            agreed = []
            for end, answer in zip(ends, answers, strict=True):
                agreed.append(model.agreeing_tokens(through, end, answer, options.page_size))
                bar.update()
            results.append(
                FormatResult(
                    str(format_), through.token_bytes, through.key_error, through.value_error,
                    losses, best, agreed,
                )
            )  # fmt: skip
    return Report(
        model=options.model_path.name,
        dtype=options.dtype,
        text=options.text.name,
        text_tokens=text.n_tokens,
        page_size=options.page_size,
        stretch_tokens=STRETCH_TOKENS - 1,
        answer_tokens=ANSWER_TOKENS,
        n_stretches=len(starts),
        n_prompts=len(ends),
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
    if options.stretches is not None:
        words += ["--stretches", str(options.stretches)]
    return " ".join(words)


if __name__ == "__main__":
    main()
