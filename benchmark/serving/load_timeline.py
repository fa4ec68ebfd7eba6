"""How much of a load is hidden under the forward pass that needs it: one timeline, read.

Starts a server with `--tiered-kv-trace-file`, asks about one long prompt three times (computed,
then found in host memory, then on disk) and says for each load when its layers arrived and when the
forward pass wanted them. A layer is hidden if it was there before it was wanted; the share of the
copy that is hidden is what the pass did not wait for. Writes OUT.json, and keeps the trace beside
it if --keep-trace is given: open it in ui.perfetto.dev.

Example:
  python -m benchmark.serving.load_timeline \\
      --model-path ~/.cache/tiered_kv/models/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmark.command_line import RESULTS, parser_of
from harness.client import generate
from harness.metrics import wait_for_disk
from harness.prompts import PromptMaker
from harness.server import BASE_ARGS, Server
from tiered_kv.core.ids import Tier
from tiered_kv.metrics.timeline import Event
from tiered_kv.tiers.timeline import (
    CLOCK,
    LAYER_COPIES,
    LAYER_WAITS,
    PASSES,
    Rows,
    read_events,
    rows_of,
    store_reads,
)

PAGE_SIZE = 64
#: The file is written once a second.
FLUSHED_S = 2.5


@dataclass(frozen=True)
class LoadReport:
    """One load from the host to the device. Times in milliseconds."""

    layers: int
    layers_hidden: int
    """There before the forward pass wanted them."""
    copy_ms: float
    waited_ms: float
    """What the pass waited for layers."""
    hidden_share: float
    """1 - waited / copy."""
    pass_ms: float
    copy_under_pass_ms: float
    """What of the copy took place while the pass ran."""


def end_of(event: Event) -> float:
    return float(event["ts"] + event["dur"])


def load_report(rows: Rows, load: int) -> LoadReport:
    """What became of a load, by its number. Raises ValueError if the trace lacks a part of it."""
    copies = _by_layer(rows, LAYER_COPIES, load)
    waits = _by_layer(rows, LAYER_WAITS, load)
    passes = [e for e in rows.get(PASSES, []) if e["args"]["load"] == load]
    if not copies or sorted(copies) != sorted(waits) or not passes:
        raise ValueError(f"the timeline shows only parts of load {load}")
    copy_us = sum(e["dur"] for e in copies.values())
    # Later waits for the same layer find it there.
    waited_us = sum(e["dur"] for e in waits.values())
    start, end = passes[0]["ts"], end_of(passes[0])
    under_us = sum(max(0.0, min(end_of(e), end) - max(e["ts"], start)) for e in copies.values())
    return LoadReport(
        layers=len(copies),
        layers_hidden=sum(end_of(copies[i]) <= waits[i]["ts"] for i in copies),
        copy_ms=round(copy_us / 1e3, 3),
        waited_ms=round(waited_us / 1e3, 3),
        hidden_share=round(1 - min(1.0, waited_us / copy_us), 3),
        pass_ms=round((end - start) / 1e3, 3),
        copy_under_pass_ms=round(under_us / 1e3, 3),
    )


def _by_layer(rows: Rows, row: str, load: int) -> dict[int, Event]:
    """The first span of each layer."""
    found: dict[int, Event] = {}
    for event in rows.get(row, []):
        if event["args"]["load"] == load:
            found.setdefault(event["args"]["layer"], event)
    return found


def loads_within(rows: Rows, start_us: float, end_us: float) -> list[int]:
    """The loads that began between two times, in order."""
    began = {e["args"]["load"]: e["ts"] for e in reversed(rows.get(LAYER_COPIES, []))}
    return sorted(load for load, ts in began.items() if start_us <= ts < end_us)


def spent_ms(rows: Rows, row: str, start_us: float, end_us: float) -> float:
    spans = [e for e in rows.get(row, []) if start_us <= e["ts"] < end_us]
    return round(sum(e["dur"] for e in spans) / 1e3, 3)


@dataclass(frozen=True)
class Question:
    """One request, from when to when on this process's clock (time.perf_counter)."""

    what: str
    start_s: float
    end_s: float
    prompt_tokens: int
    cached: dict[str, int]


def ask(server: Server, what: str, prompt: tuple[int, ...]) -> Question:
    start_s = time.perf_counter()
    answer = generate(server, prompt, max_new_tokens=1)
    cached = {"device": answer.device, "host": answer.host, "disk": answer.disk}
    return Question(what, start_s, time.perf_counter(), answer.prompt_tokens, cached)


def run_server(args: argparse.Namespace, scratch: Path) -> tuple[list[Question], Path]:
    """(questions, the trace)."""
    trace = scratch / "trace.json"
    n = args.prompt_tokens
    flags = [
        *BASE_ARGS,
        *("--dtype", args.dtype, "--page-size", PAGE_SIZE, "--context-length", n + 1024),
        *("--max-total-tokens", n + 1024, "--chunked-prefill-size", -1, "--enable-metrics"),
        # What SGLang derives from prefills without chunks is below 0 on a small machine.
        *("--mem-fraction-static", 0.6),
        *("--tiered-kv", "--tiered-kv-host-ratio", 3, "--tiered-kv-load-policy", "always"),
        *("--tiered-kv-disk-dir", scratch / "disk", "--tiered-kv-disk-size", "4GB"),
        *("--tiered-kv-trace-file", trace),
    ]
    prompts = PromptMaker(args.model_path)
    prefix = prompts.tokens("the long one", n)
    tails = [prompts.tokens(f"question {i}", args.new_tokens) for i in range(3)]
    questions: list[Question] = []
    with (
        tqdm(total=5, desc="load_timeline", unit="step") as bar,
        Server([str(flag) for flag in flags], scratch / "server.log", args.model_path) as server,
    ):
        bar.update()
        generate(server, prompts.tokens("warm up", 300), max_new_tokens=2)
        questions.append(ask(server, "computed", prefix + tails[0]))
        bar.update()
        wait_for_disk(server)
        generate(server, prompts.tokens("another long one", n), max_new_tokens=1)
        wait_for_disk(server)
        bar.update()
        questions.append(ask(server, "host hit", prefix + tails[1]))
        bar.update()
        wait_for_disk(server)
        server.flush_cache()
        questions.append(ask(server, "disk hit", prefix + tails[2]))
        bar.update()
        time.sleep(FLUSHED_S)
    return questions, trace


def report(questions: list[Question], events: list[Event]) -> list[dict[str, Any]]:
    (origin_s,) = [e["args"]["perf_counter_s"] for e in events if e["name"] == CLOCK]
    rows, out = rows_of(events), []
    for question in questions:
        start_us, end_us = ((s - origin_s) * 1e6 for s in (question.start_s, question.end_s))
        loads = [load_report(rows, load) for load in loads_within(rows, start_us, end_us)]
        out.append(
            {
                "what": question.what,
                "prompt_tokens": question.prompt_tokens,
                "cached_tokens": question.cached,
                "request_ms": round(1e3 * (question.end_s - question.start_s), 1),
                "disk_reads_ms": spent_ms(rows, store_reads(Tier.DISK), start_us, end_us),
                "loads": [asdict(load) for load in loads],
            }
        )
    return out


def show(found: list[dict[str, Any]]) -> None:
    for question in found:
        print(
            f"{question['what']}: {question['prompt_tokens']} prompt tokens, cached "
            f"{question['cached_tokens']}, {question['request_ms']} ms; disk reads "
            f"{question['disk_reads_ms']} ms"
        )
        for load in question["loads"]:
            print(
                f"  load: {load['layers_hidden']} of {load['layers']} layers were there before "
                f"they were wanted; the copy took {load['copy_ms']} ms, of which the pass "
                f"({load['pass_ms']} ms) waited for {load['waited_ms']} ms: "
                f"{100 * load['hidden_share']:.0f}% hidden"
            )


def arguments() -> argparse.Namespace:
    parser = parser_of("benchmark.serving.load_timeline", __doc__)
    parser.add_argument("--model-path", type=Path, required=True, help="a model's folder")
    parser.add_argument("--dtype", default="bfloat16", help="default: bfloat16")
    parser.add_argument(
        "--prompt-tokens", type=int, default=3072, help="of the prompt that is reused; default 3072"
    )
    parser.add_argument(
        "--new-tokens", type=int, default=128, help="after it, in each question; default 128"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "load_timeline.json")
    parser.add_argument("--keep-trace", action="store_true", help="beside OUT, as OUT.trace.json")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as scratch:
        questions, trace = run_server(args, Path(scratch))
        found = report(questions, read_events(trace))
        if args.keep_trace:
            shutil.copy(trace, args.out.with_suffix(".trace.json"))
    show(found)
    about = {
        "model": args.model_path.name,
        "dtype": args.dtype,
        "page_size": PAGE_SIZE,
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "load_average": round(os.getloadavg()[0], 1),
    }
    args.out.write_text(json.dumps({"about": about, "questions": found}, indent=1) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
