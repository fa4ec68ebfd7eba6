"""What the comparison of orders found, in figures and in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from benchmark.simulation.orders_load import N_WAVES, OBJECTIVES, POOL_TOKENS
from benchmark.simulation.pace import Pace

#: Shares of requests in time that differ by less than this have no order to get right.
TIE = 0.05


@dataclass(frozen=True)
class Wave:
    """What one policy made of one wave, on the server or simulated."""

    met: Sequence[tuple[str, bool]]
    """Class, and whether it was in time, of each request."""
    ttfts_s: Sequence[float]
    hit_tokens: int
    span_s: float
    unit_s: float
    """What prefilling a whole prompt took then."""


@dataclass(frozen=True)
class Outcome:
    """Of one policy under one load, on the server or simulated.

    The unit of time is what prefilling a whole prompt takes at the machine's pace then.
    """

    in_time: float
    """Share of the requests that met their objectives."""
    in_time_by_class: dict[str, float]
    goodput: float
    """Requests in time per unit of time."""
    ttft_mean: float
    ttft_p90: float
    ttft_p99: float
    hit_tokens: int


@dataclass(frozen=True)
class Pair:
    """One policy under one load on both, and the machine's pace meanwhile, wave by wave."""

    measured: Outcome
    simulated: Outcome
    paces: tuple[Pace, ...]


def outcome_of(waves: Sequence[Wave]) -> Outcome:
    """All waves of a load together, each in its own unit of time."""
    met = [one for wave in waves for one in wave.met]
    ttfts = np.array([ttft_s / wave.unit_s for wave in waves for ttft_s in wave.ttfts_s])
    by_class = {
        name: statistics.fmean(is_met for of, is_met in met if of == name)
        for name in sorted({name for name, _ in met})
    }
    n_met = sum(is_met for _, is_met in met)
    return Outcome(
        n_met / len(met),
        by_class,
        n_met / sum(wave.span_s / wave.unit_s for wave in waves),
        float(ttfts.mean()),
        float(np.percentile(ttfts, 90)),
        float(np.percentile(ttfts, 99)),
        sum(wave.hit_tokens for wave in waves),
    )


def disagreements(real: dict[str, Outcome], model: dict[str, Outcome]) -> list[str]:
    """Pairs of policies that the simulator ranks otherwise by requests in time; ties left out."""
    wrong = []
    for one, other in combinations(real, 2):
        apart = real[one].in_time - real[other].in_time
        if abs(apart) > TIE and apart * (model[one].in_time - model[other].in_time) < 0:
            wrong.append(f"{one} and {other}")
    return wrong


def table(pairs: dict[str, Pair]) -> str:
    """One load, in Markdown: measured, and simulated in brackets."""
    columns = "policy, in time, interactive, standard, batch, goodput, TTFT mean, p90, p99"
    heads = [*columns.split(", "), "hit tokens", "violations / fcfs's", "goodput / fcfs's", "pace"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    fcfs = pairs["fcfs"].measured if "fcfs" in pairs else None
    for name, pair in pairs.items():
        a, b = pair.measured, pair.simulated
        classes = (
            f"{a.in_time_by_class[c]:.0%} ({b.in_time_by_class[c]:.0%})" for c, *_ in OBJECTIVES
        )
        late_ratio = (
            f"{(1 - a.in_time) / (1 - fcfs.in_time):.2f}" if fcfs and fcfs.in_time < 1 else "-"
        )
        cells = [
            f"{a.in_time:.0%} ({b.in_time:.0%})",
            *classes,
            f"{a.goodput:.2f} ({b.goodput:.2f})",
            f"{a.ttft_mean:.1f} ({b.ttft_mean:.1f})",
            f"{a.ttft_p90:.1f} ({b.ttft_p90:.1f})",
            f"{a.ttft_p99:.1f} ({b.ttft_p99:.1f})",
            f"{a.hit_tokens:,} ({b.hit_tokens:,})",
            late_ratio,
            f"{a.goodput / fcfs.goodput:.2f}" if fcfs and fcfs.goodput else "-",
            "; ".join(map(str, pair.paces)),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def report(found: dict[float, dict[str, Pair]], unit_s: float, n_requests: int) -> str:
    """All loads, in Markdown."""
    objectives = "; ".join(
        f"{name} {share:.0%}: first token in {ttft:g}"
        + ("" if tbt is None else f", {tbt:g} between tokens")
        for name, share, ttft, tbt in OBJECTIVES
    )
    about = (
        "Made by `python -m benchmark.simulation.orders`: the real server on two cores without a "
        "GPU, and in brackets the simulator. The unit of time is the prefill of a whole prompt at "
        f"the machine's pace then ({unit_s:.2f} s when it was measured). {n_requests} requests "
        f"per load in {N_WAVES} waves, which the policies take in turn; a pool of {POOL_TOKENS:,} "
        f"tokens; {objectives}. Pace: a wave's own prefills / decodes against those before."
    )
    parts = ["# Orders of the waiting queue on the real server", about]
    for load, pairs in found.items():
        wrong = disagreements(
            {name: pair.measured for name, pair in pairs.items()},
            {name: pair.simulated for name, pair in pairs.items()},
        )
        verdict = (
            "The simulator ranks all pairs as the server does"
            if not wrong
            else f"The simulator ranks otherwise: {', '.join(wrong)}"
        )
        parts.append(
            f"## Load {load:g}\n\n{table(pairs)}\n\n{verdict} (by requests in time; pairs "
            f"less than {TIE:.0%} apart left out)."
        )
    return "\n\n".join(parts) + "\n"
