"""Time to first token where documents come in another order each time, with and without marks.

Two servers with the same model stay up: plain SGLang, and --tiered-kv. Each question is asked of
plain SGLang and of --tiered-kv with its documents as they come, and of --tiered-kv with documents
that commute (docs/slo.md), in turns, because few machines keep their speed. The first questions of
a case fill the caches and are not counted. What was answered to documents that commute is compared
with what plain SGLang says to the same documents in the order that was told. Writes NAME.json and
NAME.md.

Example: python -m benchmark.serving.spans \\
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmark.command_line import RESULTS, parser_of
from benchmark.serving.systems import plain_and_tiered
from harness.prompts import story
from harness.server import BASE_ARGS, Server
from harness.servers import servers_up

TIERED = ("--tiered-kv", "--tiered-kv-disk-dir", "none")
SYSTEMS = {
    "plain": "plain SGLang",
    "tiered": "--tiered-kv, documents as they come",
    "commuting": "--tiered-kv, documents that commute",
}
BEGINNING = "Answer from these documents only. "
#: Questions of each case before those that count.
N_FIRST = 6


@dataclass(frozen=True)
class Case:
    """Questions about `n_asked` documents out of `n_documents`."""

    name: str
    n_documents: int
    n_asked: int

    def documents(self, rng: random.Random) -> list[int]:
        """Of one question, in a random order; the first ones of all are found more often."""
        weights = [1 / (1 + i) for i in range(self.n_documents)]
        keys = {i: rng.random() ** (1 / weight) for i, weight in enumerate(weights)}
        found = sorted(keys, key=keys.__getitem__, reverse=True)[: self.n_asked]
        rng.shuffle(found)
        return found


CASES = (Case("the same eight", 8, 8), Case("six of eight", 8, 6), Case("six of sixteen", 16, 6))


def ask(server: Server, body: dict[str, Any], n_new: int) -> tuple[float, dict[str, Any]]:
    """Seconds, and the answer."""
    body["sampling_params"] = {"temperature": 0, "max_new_tokens": n_new, "ignore_eos": True}
    start = time.perf_counter()
    response = server.post("/generate", body, timeout_s=600.0)
    seconds = time.perf_counter() - start
    response.raise_for_status()
    return seconds, response.json()


def measure(case: Case, up: dict[str, Server], options: argparse.Namespace) -> dict[str, Any]:
    rng = random.Random(case.name)
    texts = [f"[{story(f'{case.name} {i}', options.sentences)}] " for i in range(case.n_documents)]
    for server in up.values():
        server.flush_cache()
    seconds: dict[str, list[float]] = {name: [] for name in SYSTEMS}
    cached: dict[str, list[float]] = {name: [] for name in SYSTEMS}
    equal = total = 0
    for question in tqdm(range(N_FIRST + options.questions), desc=case.name, leave=False):
        found = case.documents(rng)
        end = f"Question {question}: who was it?"
        spans = [{"text": texts[i], "commutes": True} for i in found]
        bodies = {
            "plain": {"text": BEGINNING + "".join(texts[i] for i in found) + end},
            "tiered": {"text": BEGINNING + "".join(texts[i] for i in found) + end},
            "commuting": {"spans": [BEGINNING, *spans, end]},
        }
        names = list(SYSTEMS)
        for name in names[question % 3 :] + names[: question % 3]:
            server = up["plain" if name == "plain" else "tiered"]
            # Each of the two on --tiered-kv has a tree of its own.
            own = {} if name == "plain" else {"extra_key": name}
            took, answer = ask(server, {**bodies[name], **own}, 1)
            if question < N_FIRST:
                continue
            meta = answer["meta_info"]
            seconds[name].append(took)
            cached[name].append(meta["cached_tokens"] / meta["prompt_tokens"])
        if question % 4 == 3:
            _, said = ask(up["tiered"], {**bodies["commuting"], "extra_key": "commuting"}, 8)
            (order,) = said["meta_info"]["tiered_kv"]["span_order"]
            text = BEGINNING + "".join(texts[found[i]] for i in order) + end
            _, plain = ask(up["plain"], {"text": text, "extra_key": "compared"}, 8)
            equal += said["text"] == plain["text"]
            total += 1

    def ratio(slow: str) -> float:
        pairs = zip(seconds[slow], seconds["commuting"], strict=True)
        return statistics.median(s / f for s, f in pairs)

    return {
        "case": case.name,
        "prompt_tokens": meta["prompt_tokens"],
        **{f"{name}_ms": 1e3 * statistics.median(took) for name, took in seconds.items()},
        **{f"{name}_cached": statistics.mean(share) for name, share in cached.items()},
        "plain_by_commuting": ratio("plain"),
        "tiered_by_commuting": ratio("tiered"),
        "equal": equal,
        "total": total,
        "seconds": seconds,
    }


def table(results: list[dict[str, Any]]) -> str:
    head = "| documents | prompt | plain, ms | tiered, ms | commuting, ms | plain / commuting "
    head += "| tiered / commuting | cached: plain | tiered | commuting | equal |"
    lines = [head, "|---" * 11 + "|"]
    for row in results:
        shares = " | ".join(f"{row[f'{name}_cached']:.2f}" for name in SYSTEMS)
        lines.append(
            f"| {row['case']} | {row['prompt_tokens']} | {row['plain_ms']:.0f} "
            f"| {row['tiered_ms']:.0f} | {row['commuting_ms']:.0f} "
            f"| {row['plain_by_commuting']:.2f} | {row['tiered_by_commuting']:.2f} "
            f"| {shares} | {row['equal']} of {row['total']} |"
        )
    return "\n".join(lines)


def report(options: argparse.Namespace, results: list[dict[str, Any]]) -> str:
    what = "; ".join(f"{name}: {text}" for name, text in SYSTEMS.items())
    return f"""# Documents in changing order

Time to first token of a question about documents that come in another order each time, the first
ones of all being found more often: medians of {options.questions} questions, one at a time, ratios
of the same question. {options.model.name} in float32 on {platform.machine()} with
{len(os.sched_getaffinity(0))} cores. {what}. cached: share of the prompt. equal: answers that are
those of plain SGLang for the order that was told.
{options.note}

{table(results)}

    python -m benchmark.serving.spans --questions {options.questions} \\
        --sentences {options.sentences}
"""


def main() -> None:
    parser = parser_of("benchmark.serving.spans", __doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--questions", type=int, default=12, help="that count, of each case")
    parser.add_argument("--sentences", type=int, default=5, help="of each document")
    parser.add_argument("--note", default="", help="a sentence on the machine, for the report")
    parser.add_argument("--out", type=Path, default=RESULTS / "spans_cpu", metavar="NAME")
    options = parser.parse_args()
    common = [*BASE_ARGS, "--dtype", "float32", "--max-total-tokens", "16384"]
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="spans_") as folder:
        servers = plain_and_tiered(options.model, common, TIERED, Path(folder))
        with servers_up(servers) as up:
            for case in CASES:
                results.append(measure(case, up, options))
                # After every case: what was measured is kept if the rest fails.
                options.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
                options.out.with_suffix(".md").write_text(report(options, results))
    print(table(results))


if __name__ == "__main__":
    main()
