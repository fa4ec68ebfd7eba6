"""Results as pictures; every function writes one PNG file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tiered_kv.simulation.statistics import CDF_SHARES

Run = dict[str, Any]


def plot_cdfs(runs: Sequence[Run], path: Path, title: str) -> None:
    """Distributions of TTFT and of requests' mean TBT, a curve per run."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5))
    for axis, key, label in zip(
        axes, ("ttft_s", "mean_tbt_s"), ("TTFT (s)", "mean TBT of a request (s)"), strict=True
    ):
        for run in runs:
            if run[key]["cdf"]:
                axis.plot(run[key]["cdf"], CDF_SHARES, label=name(run))
        axis.set_xscale("log")
        axis.set_xlabel(label)
        axis.set_ylabel("share of requests")
    _finish(figure, axes[0], path, title)


def plot_goodput(runs: Sequence[Run], path: Path, title: str) -> None:
    """Goodput and share of objectives met against load, a line per policy."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5))
    for policy, points in _by_policy(runs).items():
        loads = [point["workload"]["rate"] for point in points]
        axes[0].plot(loads, [point["goodput_rps"] for point in points], "o-", label=policy)
        axes[1].plot(loads, [point["attainment"] for point in points], "o-", label=policy)
    for axis, label in zip(axes, ("goodput (requests/s)", "objectives met"), strict=True):
        axis.set_xlabel("load (times the workload's own rate)")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
    _finish(figure, axes[0], path, title)


def plot_classes(runs: Sequence[Run], path: Path, title: str) -> None:
    """Share of objectives met per service class, a group of bars per run."""
    classes = sorted({name for run in runs for name in run["classes"]})
    figure, axis = plt.subplots(figsize=(12, 4.5))
    width = 0.8 / max(1, len(classes))
    for index, slo_class in enumerate(classes):
        shares = [run["classes"].get(slo_class, {}).get("attainment", 0.0) for run in runs]
        places = [place + index * width for place in range(len(runs))]
        axis.bar(places, shares, width, label=slo_class)
    axis.set_xticks([place + 0.4 - width / 2 for place in range(len(runs))])
    axis.set_xticklabels([name(run) for run in runs], rotation=30, ha="right")
    axis.set_ylabel("objectives met")
    _finish(figure, axis, path, title)


def plot_wait_tail(runs: Sequence[Run], path: Path, title: str) -> None:
    """How many wait longer than t for their admission, a curve per run."""
    figure, axis = plt.subplots(figsize=(8, 4.5))
    for run in runs:
        cdf = run["wait_s"]["cdf"]
        tail = [(wait_s, 1 - share) for wait_s, share in zip(cdf, CDF_SHARES, strict=False)]
        tail = [(wait_s, share) for wait_s, share in tail if wait_s > 0 and share > 0]
        if tail:
            axis.plot(*zip(*tail, strict=True), label=name(run))
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("wait t (s)")
    axis.set_ylabel("share of requests that wait longer")
    _finish(figure, axis, path, title)


def plot_hits(runs: Sequence[Run], path: Path, title: str) -> None:
    """Hit tokens against the capacity of device and host, a line per eviction policy.

    A run without limit on the host (label `infinite`) is drawn as a horizontal line.
    """
    figure, axis = plt.subplots(figsize=(8, 4.5))
    lines: dict[str, list[tuple[float, float]]] = {}
    for run in runs:
        found = run["hits"]
        share = 1 - found["computed"] / max(1, found["input"])
        if run["labels"].get("infinite"):
            axis.axhline(share, color="black", linestyle=":", label="infinite")
            continue
        settings = run["settings"]
        capacity = (settings["device_tokens"] + settings["host_tokens"]) / 1e6
        lines.setdefault(settings["eviction"], []).append((capacity, share))
    for eviction, points in lines.items():
        axis.plot(*zip(*sorted(points), strict=True), "o-", label=eviction)
    axis.set_xscale("log")
    axis.set_xlabel("capacity of device and host (million tokens)")
    axis.set_ylabel("share of prompt tokens found")
    axis.set_ylim(bottom=0)
    _finish(figure, axis, path, title)


def name(run: Run) -> str:
    """What to call a run in a legend."""
    label = run["labels"].get("name")
    return str(label or run["settings"]["policy"])


def _by_policy(runs: Sequence[Run]) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: float(run["workload"]["rate"])):
        groups.setdefault(name(run), []).append(run)
    return groups


def _finish(figure: Figure, legend_axis: Axes, path: Path, title: str) -> None:
    legend_axis.legend(fontsize="small")
    for axis in figure.axes:
        axis.grid(visible=True, alpha=0.3)
    figure.suptitle(title)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)
