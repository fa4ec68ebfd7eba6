"""What multiturn.py measured, as rows, a table in Markdown and a plot."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmark.serving.conversations import Sample


@dataclass
class Run:
    """One system's answers in one repeat; all systems of a repeat have the same requests in the
    same order. seconds: those in which this system was asked.
    """

    system: str
    repeat: int
    samples: list[Sample]
    seconds: float
    start_seconds: float


def weighted_prefill_tokens(sample: Sample, attention_per_linear: float) -> float:
    """The prefill a prompt really cost, in tokens of a prefill without context.

    Counts FLOPs of the prefill only; not the prefill token equivalents of arXiv 2604.05404, which
    `benchmark/replay` reports.

    A computed token at position p costs 1 + p * attention_per_linear; a cached one nothing.
    """
    first, last = sample.cached, sample.prompt_tokens
    positions = (last * (last - 1) - first * (first - 1)) / 2
    return (last - first) + positions * attention_per_linear


def ratios(runs: Sequence[Run], base: Sequence[Run]) -> list[float]:
    """TTFT of every later turn as a multiple of that of the same request in `base`."""
    return [
        ours.ttft_s / theirs.ttft_s
        for run, other in zip(runs, base, strict=True)
        for ours, theirs in zip(run.samples, other.samples, strict=True)
        if ours.turn > 0
    ]


def row(
    runs: Sequence[Run], base: Sequence[Run] | None, attention_per_linear: float
) -> dict[str, Any]:
    """All repeats of one system together. TTFT of later turns only: the first has no past."""
    samples = [sample for run in runs for sample in run.samples]
    later = [sample for sample in samples if sample.turn > 0] or samples
    ttft = [sample.ttft_s for sample in later]
    p50, p90, p99 = np.quantile(ttft, (0.5, 0.9, 0.99)).tolist()
    seconds = sum(run.seconds for run in runs)
    prompt = sum(sample.prompt_tokens for sample in samples)
    return {
        "system": runs[0].system,
        "repeats": len(runs),
        "requests": len(samples),
        "ttft_p50_s": p50,
        "ttft_p90_s": p90,
        "ttft_p99_s": p99,
        "ttft_mean_s": statistics.fmean(ttft),
        "ttft_p50_s_by_repeat": [
            statistics.median([s.ttft_s for s in run.samples if s.turn > 0] or [0.0])
            for run in runs
        ],
        "first_turn_ttft_p50_s": statistics.median(s.ttft_s for s in samples if s.turn == 0),
        "ttft_by_limit_p50": statistics.median(ratios(runs, base) or [1.0]) if base else None,
        "e2e_p50_s": statistics.median(s.e2e_s for s in later),
        "requests_per_s": len(samples) / seconds,
        "prompt_tokens": prompt,
        "hit_share": sum(s.cached for s in samples) / prompt,
        "hit_tokens_device": sum(s.device for s in samples),
        "hit_tokens_host": sum(s.host for s in samples),
        "hit_tokens_disk": sum(s.disk for s in samples),
        "weighted_prefill_tokens": sum(
            weighted_prefill_tokens(s, attention_per_linear) for s in samples
        ),
    }


def table(rows: Sequence[Mapping[str, Any]], baseline: str = "limit") -> str:
    base = next((r for r in rows if r["system"] == baseline), None)
    head = (
        "| system | TTFT p50 | p90 | p99 (s) | p50 / limit | p99 / limit | by request | requests/s "
        "| hits: device | host | disk (tokens) | weighted prefill |\n"
    )
    head += "|---" * 12 + "|"
    lines = [head]
    for r in rows:
        keys = ("ttft_p50_s", "ttft_p99_s")
        by_limit = [f"{r[key] / base[key]:.2f}x" if base else "" for key in keys]
        by_limit.append(f"{r['ttft_by_limit_p50']:.2f}x" if base else "")
        lines.append(
            f"| {r['system']} | {r['ttft_p50_s']:.3f} | {r['ttft_p90_s']:.3f} "
            f"| {r['ttft_p99_s']:.3f} | {' | '.join(by_limit)} | {r['requests_per_s']:.2f} "
            f"| {r['hit_tokens_device']:,} | {r['hit_tokens_host']:,} | {r['hit_tokens_disk']:,} "
            f"| {r['weighted_prefill_tokens']:,.0f} |"
        )
    return "\n".join(lines)


def machine() -> str:
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    return f"{os.cpu_count()} cores, {cpu}, no accelerator"


def plot(rows: Sequence[Mapping[str, Any]], runs: Sequence[Run], title: str, path: Path) -> None:
    """Two panels: the distribution of TTFT of later turns; where the prompts' KV came from."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 4.8), layout="constrained")
    for r in rows:
        ttft = sorted(
            s.ttft_s for run in runs if run.system == r["system"] for s in run.samples if s.turn
        )
        share = [(i + 1) / len(ttft) for i in range(len(ttft))]
        left.step(ttft, share, where="post", label=r["system"])
    left.set(xlabel="TTFT of turns after the first (s)", ylabel="share of requests", title=title)
    left.legend(loc="lower right", fontsize=8)
    left.grid(alpha=0.3)

    names = [r["system"] for r in rows]
    start = [0.0] * len(rows)
    parts = ("device", "host", "disk")
    for part in parts:
        values = [r[f"hit_tokens_{part}"] / r["prompt_tokens"] for r in rows]
        right.barh(names, values, left=start, label=part)
        start = [a + b for a, b in zip(start, values, strict=True)]
    right.barh(names, [1 - s for s in start], left=start, label="computed", color="lightgray")
    right.invert_yaxis()
    right.set(xlabel="share of prompt tokens", title="where the prompts' KV came from")
    right.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
