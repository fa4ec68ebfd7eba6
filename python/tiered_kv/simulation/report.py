"""A directory with the tables and pictures of some runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tiered_kv.simulation import plots
from tiered_kv.simulation.tables import Run, results_table


def write_report(runs: Sequence[Run], directory: Path, *, prefix: str = "") -> Path:
    """Writes `report.md` and PNGs, named with `prefix`, into `directory`; returns report.md.

    Runs are grouped by workload, model and device; distributions are drawn for each load.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lines = ["# Simulated results", ""]
    for title, group in _groups(runs).items():
        slug = prefix + "".join(c if c.isalnum() else "_" for c in title.lower())
        lines += [f"## {title}", "", results_table(group)]
        for name in write_pictures(group, directory, slug, title):
            lines += [f"![{name}]({name})", ""]
    path = directory / f"{prefix}report.md"
    path.write_text("\n".join(lines))
    return path


def write_pictures(group: Sequence[Run], directory: Path, slug: str, title: str) -> list[str]:
    """All pictures of runs of one workload, model and device; returns the files' names."""
    names = []
    rates = sorted({run["workload"]["rate"] for run in group})
    for rate in rates:
        some = [run for run in group if run["workload"]["rate"] == rate]
        at = f"{slug}_rate_{rate:.3g}".replace(".", "_")
        heading = f"{title}, rate {rate:.3g}"
        plots.plot_cdfs(some, directory / f"{at}_cdf.png", heading)
        plots.plot_classes(some, directory / f"{at}_classes.png", heading)
        plots.plot_wait_tail(some, directory / f"{at}_wait.png", heading)
        names += [f"{at}_cdf.png", f"{at}_classes.png", f"{at}_wait.png"]
    if len(rates) > 1:
        plots.plot_goodput(group, directory / f"{slug}_goodput.png", title)
        names.append(f"{slug}_goodput.png")
    if len({run["settings"]["host_tokens"] for run in group}) > 1:
        plots.plot_hits(group, directory / f"{slug}_hits.png", title)
        names.append(f"{slug}_hits.png")
    return names


def _groups(runs: Sequence[Run]) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        settings, workload = run["settings"], run["workload"]
        title = f"{workload['name']}, {settings['model']} on {settings['device']}"
        groups.setdefault(title, []).append(run)
    return groups
