"""What `agreement.py` found, as figures, sentences, Markdown and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmark.simulation.measure import Measurements, residuals, table
from benchmark.simulation.pace import Pace
from tiered_kv.simulation.measured_server import MeasuredServer

TOLERANCE = 0.15
#: Policies whose measured mean TTFTs are nearer than this have no order to get right.
TIE = 0.05


@dataclass(frozen=True)
class Figures:
    """What is compared; times in seconds."""

    ttft_mean_s: float
    ttft_p90_s: float
    hit_tokens: int
    tpot_mean_s: float


@dataclass(frozen=True)
class Comparison:
    """One policy on both."""

    policy: str
    measured: Figures
    simulated: Figures
    simulated_by_reference: Figures
    """At the pace of reference passes around each wave."""
    requests: tuple[dict[str, float], ...] = ()
    """Of each request on both: TTFT in seconds and hit tokens."""
    paces: tuple[Pace, ...] = ()
    """How fast each wave's own passes were; the simulated machine was as fast."""
    around: tuple[Pace, ...] = ()
    """How fast those reference passes were."""

    def errors_by_reference(self) -> dict[str, float]:
        """As `errors`, at the pace of the reference passes."""
        return _errors(self.simulated_by_reference, self.measured)

    def errors(self) -> dict[str, float]:
        """Simulated over measured, less 1, of the figures that are held to the tolerance."""
        return _errors(self.simulated, self.measured)


def _errors(simulated: Figures, measured: Figures) -> dict[str, float]:
    return {
        name: getattr(simulated, name) / getattr(measured, name) - 1.0
        for name in ("ttft_mean_s", "ttft_p90_s", "hit_tokens")
    }


def ranking(comparisons: Sequence[Comparison]) -> list[str]:
    """Pairs that the simulator orders otherwise than the server, in words; ties are left out."""
    wrong = []
    for at, one in enumerate(comparisons):
        for other in comparisons[at + 1 :]:
            a, b = one.measured.ttft_mean_s, other.measured.ttft_mean_s
            if abs(a - b) <= TIE * max(a, b):
                continue
            if (a < b) != (one.simulated.ttft_mean_s < other.simulated.ttft_mean_s):
                wrong.append(f"{one.policy} and {other.policy}")
    return wrong


def broken(comparisons: Sequence[Comparison]) -> list[str]:
    """What is further apart than allowed, in words."""
    found = [
        f"{c.policy}: {name} is off by {error:+.1%}"
        for c in comparisons
        for name, error in c.errors().items()
        if not abs(error) <= TOLERANCE
    ]
    return found + [f"the order of {pair} is wrong" for pair in ranking(comparisons)]


def report(
    samples: Measurements,
    server: MeasuredServer,
    load: str,
    comparisons: Sequence[Comparison],
) -> str:
    """Both side by side, in Markdown; `load` says in words what was asked of them."""
    lines = [
        "# The simulator held against the real server",
        "",
        "Made by `python -m benchmark.simulation.agreement --model-path MODEL`.",
        "",
        f"{server.model}, float32, {server.host}. {load}",
        "",
        "| policy | | TTFT mean | p90 | hit tokens | time per output token |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for comparison in comparisons:
        for name, f in (("server", comparison.measured), ("simulator", comparison.simulated)):
            lines.append(
                f"| {comparison.policy} | {name} | {f.ttft_mean_s:.2f} s | {f.ttft_p90_s:.2f} s "
                f"| {f.hit_tokens:,} | {1000 * f.tpot_mean_s:.0f} ms |"
            )
        errors = " | ".join(f"{error:+.1%}" for error in comparison.errors().values())
        lines.append(f"| | error | {errors} | |")
    wrong = broken(comparisons)
    lines += ["", f"Within {TOLERANCE:.0%} and ranked alike: {'no' if wrong else 'yes'}."]
    lines += [f"- {sentence}" for sentence in wrong]
    lines += [
        "",
        (
            "The machine's pace, wave by wave: each wave's own prefills / decodes, together, "
            "against what was fitted for as many of their kind. The simulated machine was as fast. "
            "Reference passes before and after each wave, which see nothing of what happens "
            "between them, say something else on a machine that is shared:"
        ),
        "",
        "| policy | own passes | reference passes | errors at the pace of these |",
        "|---|---|---|---|",
    ]
    for c in comparisons:
        errors = ", ".join(f"{error:+.1%}" for error in c.errors_by_reference().values())
        own, around = (", ".join(map(str, paces)) for paces in (c.paces, c.around))
        lines.append(f"| {c.policy} | {own} | {around} | {errors} |")
    overhead_ms = 1000 * server.request_overhead_s
    lines += [
        "",
        f"Passes, as measured and fitted; {overhead_ms:.0f} ms of TTFT are neither pass nor wait.",
        "",
        table(residuals(samples, server.times)),
        "",
    ]
    return "\n".join(lines)


def as_json(
    samples: Measurements,
    comparisons: Sequence[Comparison],
) -> dict[str, Any]:
    """All figures but the fitted passes, which get a file of their own."""
    return {
        "policies": [asdict(comparison) for comparison in comparisons],
        "samples": asdict(samples),
    }
