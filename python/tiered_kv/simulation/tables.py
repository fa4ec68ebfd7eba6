"""Results as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Run = dict[str, Any]
Column = tuple[str, Callable[[Run], str]]


def markdown(columns: Sequence[Column], runs: Sequence[Run]) -> str:
    """One row per run."""
    rows = [[title for title, _ in columns], ["---"] * len(columns)]
    rows += [[cell(run) for _, cell in columns] for run in runs]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def results_table(runs: Sequence[Run]) -> str:
    """The usual figures of some runs; the columns of their classes follow the first run's."""
    columns: list[Column] = [
        ("policy", lambda run: str(run["labels"].get("name") or run["settings"]["policy"])),
        ("eviction", lambda run: str(run["settings"]["eviction"])),
        ("rate", lambda run: f"{run['workload']['rate']:.3g}"),
        ("goodput/s", lambda run: f"{run['goodput_rps']:.3f}"),
        ("met", lambda run: percent(run["attainment"])),
    ]
    columns += [(name, _class_cell(name)) for name in sorted(runs[0]["classes"])] if runs else []
    columns += [
        ("TTFT mean", lambda run: seconds(run["ttft_s"]["mean"])),
        ("p50", lambda run: seconds(run["ttft_s"]["p50"])),
        ("p90", lambda run: seconds(run["ttft_s"]["p90"])),
        ("p99", lambda run: seconds(run["ttft_s"]["p99"])),
        ("TBT mean", lambda run: seconds(run["mean_tbt_s"]["mean"])),
        ("p99 of means", lambda run: seconds(run["mean_tbt_s"]["p99"])),
        ("hits device/host/disk", hits),
        ("retracted", lambda run: percent(run["retracted_share"])),
        ("busy", lambda run: percent(run["busy_share"])),
    ]
    return markdown(columns, runs)


def comparison_table(first: Sequence[Run], second: Sequence[Run]) -> str:
    """Second to first, run by run: ratios of figures. Runs pair up in order."""
    figures: list[tuple[str, Callable[[Run], float | None]]] = [
        ("goodput", lambda run: run["goodput_rps"]),
        ("met", lambda run: run["attainment"]),
        ("TTFT mean", lambda run: run["ttft_s"]["mean"]),
        ("TTFT p90", lambda run: run["ttft_s"]["p90"]),
        ("TTFT p99", lambda run: run["ttft_s"]["p99"]),
        ("TBT mean", lambda run: run["mean_tbt_s"]["mean"]),
        ("tokens computed", lambda run: run["hits"]["computed"]),
        ("throughput", lambda run: run["throughput_rps"]),
    ]
    rows = [["run", *(title for title, _ in figures)], ["---"] * (len(figures) + 1)]
    for one, other in zip(first, second, strict=False):
        cells = [ratio(figure(other), figure(one)) for _, figure in figures]
        rows.append([f"{describe(other)} / {describe(one)}", *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def describe(run: Run) -> str:
    """What was run, in a few words."""
    settings, workload = run["settings"], run["workload"]
    return f"{settings['policy']}+{settings['eviction']}@{workload['rate']:.3g}"


def ratio(value: float | None, base: float | None) -> str:
    """`value` / `base`, or a dash where there is no such number."""
    return "-" if value is None or not base else f"{value / base:.3f}"


def percent(value: float | None) -> str:
    """A share, or a dash."""
    return "-" if value is None else f"{100 * value:.1f}%"


def seconds(value: float | None) -> str:
    """A time in the unit that suits it, or a dash."""
    if value is None:
        return "-"
    return f"{value * 1e3:.0f} ms" if value < 1.0 else f"{value:.2f} s"


def hits(run: Run) -> str:
    """Shares of prompt tokens found in each tier."""
    found = run["hits"]
    total = max(1, found["input"])
    return "/".join(f"{100 * found[tier] / total:.1f}" for tier in ("device", "host", "disk")) + "%"


def _class_cell(name: str) -> Callable[[Run], str]:
    def cell(run: Run) -> str:
        found = run["classes"].get(name)
        return "-" if found is None else percent(found["attainment"])

    return cell
