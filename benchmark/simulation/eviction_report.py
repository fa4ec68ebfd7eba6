"""The report of `eviction.py`: each policy against LRU without forecasts, and all figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from tiered_kv.core.errors import ConfigError
from tiered_kv.simulation import schema
from tiered_kv.simulation.tables import Column, Run, hits, markdown, percent, seconds

BASE = "lru"
#: Differences below this share are called level: other seeds move the figures by as much.
LEVEL = 0.02
BOUNDS = ("infinite", "belady", "kvflow")
FIGURES: dict[str, Callable[[Run], float]] = {
    "computed": lambda run: float(run["hits"]["computed"]),
    "goodput": lambda run: float(run["goodput_rps"]),
    "TTFT mean": lambda run: float(run["ttft_s"]["mean"]),
    "TTFT p50": lambda run: float(run["ttft_s"]["p50"]),
    "TTFT p99": lambda run: float(run["ttft_s"]["p99"]),
}


def report(path: Path) -> Path:
    """Markdown and a picture beside the result file at `path`; returns the Markdown's path."""
    runs = schema.read_results(path)["runs"]
    places = {at: found for at, found in _by_place(runs).items() if len(found) > 1}
    names = list(dict.fromkeys(run["labels"]["name"] for run in runs))
    lines = [
        _introduction(runs[0]),
        "## Against LRU without forecasts",
        "",
        *_summary(places, names),
    ]
    lines += [f"![tokens computed against LRU]({path.stem}.png)", ""]
    for (workload, size, tiers), found in places.items():
        settings = found[0]["settings"]
        pools = f"device {settings['device_tokens']:,}"
        pools += f", host {found[-1]['settings']['host_tokens']:,}"
        pools += f", disk {settings['disk_tokens']:,}" if tiers == 3 else ""
        lines += [
            f"## {workload}, {size}, {tiers} tiers",
            "",
            f"{found[0]['n_requests']} requests ({WHAT[workload]}); tokens: {pools}.",
            "",
            markdown(_columns(), found),
        ]
    target = path.with_suffix(".md")
    target.write_text("\n".join(lines))
    plot(places, names, path.with_suffix(".png"))
    return target


Place = tuple[str, str, int]


def _by_place(runs: Sequence[Run]) -> dict[Place, list[Run]]:
    """Runs that differ in eviction only; the infinite cache is the same with a disk below."""
    places: dict[Place, list[Run]] = {}
    for run in runs:
        labels = run["labels"]
        places.setdefault((labels["workload"], labels["size"], labels["tiers"]), []).append(run)
    return places


def _ratios(places: dict[Place, list[Run]], name: str, figure: str) -> dict[Place, float]:
    """`figure` of the policy `name` against that of LRU, place by place."""
    value, found = FIGURES[figure], {}
    for place, runs in places.items():
        by_name = {run["labels"]["name"]: run for run in runs}
        if {name, BASE} <= by_name.keys() and value(by_name[BASE]):
            found[place] = value(by_name[name]) / value(by_name[BASE])
    return found


def _summary(places: dict[Place, list[Run]], names: Sequence[str]) -> list[str]:
    rows = [["policy", *FIGURES, "better / level / worse in", "worst", "best"]]
    rows.append(["---"] * len(rows[0]))
    for name in names:
        if name == BASE:
            continue
        cells = [name]
        for figure in FIGURES:
            ratios = [r for r in _ratios(places, name, figure).values() if r > 0]
            cells.append(f"{math.exp(sum(map(math.log, ratios)) / max(1, len(ratios))):.3f}")
        goodput = _ratios(places, name, "goodput").values()
        better = sum(ratio > 1 + LEVEL for ratio in goodput)
        worse = sum(ratio < 1 - LEVEL for ratio in goodput)
        cells.append(f"{better} / {len(goodput) - better - worse} / {worse}")
        cells += [f"{min(goodput):.3f}", f"{max(goodput):.3f}"]
        rows.append(cells)
    return ["\n".join("| " + " | ".join(row) + " |" for row in rows), "", SUMMARY, ""]


def _columns() -> list[Column]:
    link = "links"
    return [
        ("policy", lambda run: run["labels"]["name"]),
        ("hits device/host/disk", hits),
        ("computed", lambda run: f"{run['hits']['computed'] / 1e6:.3f} M"),
        ("goodput/s", lambda run: f"{run['goodput_rps']:.3f}"),
        ("met", lambda run: percent(run["attainment"])),
        ("TTFT mean", lambda run: seconds(run["ttft_s"]["mean"])),
        ("p50", lambda run: seconds(run["ttft_s"]["p50"])),
        ("p99", lambda run: seconds(run["ttft_s"]["p99"])),
        ("to host", lambda run: f"{run[link]['device to host']['n_bytes'] / 1e9:.0f} GB"),
        ("to disk", lambda run: f"{run[link]['host to disk']['n_bytes'] / 1e9:.0f} GB"),
        ("busy", lambda run: percent(run["busy_share"])),
    ]


def plot(places: dict[Place, list[Run]], names: Sequence[str], path: Path) -> None:
    """Goodput and tokens computed against LRU, as an image. Raises ConfigError."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ConfigError("A plot needs matplotlib; run pip install matplotlib.") from None
    figure = Figure(figsize=(12, 9), layout="constrained")
    shown = [name for name in names if name not in {BASE, "infinite"}]
    ticks = [f"{workload}\n{size}, {tiers}" for workload, size, tiers in places]
    for axes, what in zip(figure.subplots(2, 1, sharex=True), ("computed", "goodput"), strict=True):
        axes.axhline(1.0, color="black", linewidth=1)
        for name in shown:
            ratios = _ratios(places, name, what)
            is_bound = name in BOUNDS
            style = {"marker": "_", "s": 160, "color": "grey"} if is_bound else {"s": 24}
            if ", forecast" in name:
                style["marker"] = "^"
            at = [i for i, place in enumerate(places) if place in ratios]
            axes.scatter(at, list(ratios.values()), label=name, **style)
        axes.set_ylabel(f"{what}, LRU = 1")
        axes.grid(alpha=0.3)
    axes.set_xticks(range(len(ticks)), ticks, rotation=90, fontsize=8)
    figure.axes[0].legend(ncols=5, fontsize=8)
    figure.savefig(path, dpi=110)


def _introduction(run: Run) -> str:
    settings, seed = run["settings"], run["settings"]["seed"]
    return f"""\
# Eviction policies in simulation

Made by `python -m benchmark.simulation.eviction --data DIRECTORY`, seed {seed}, at
commit {run["labels"]["commit"]}. How the simulator works, and what it leaves out, is in
`docs/simulation.md`: a roofline of the device's data sheet with assumed efficiencies, not
measurements. What the policies do is in `docs/placement.md`.

- {settings["model"]} on {settings["device"]}, the order of requests `slack`, loads where that is
  sooner, chunks of 8192 tokens. The host has twice the device's tokens, the disk 16 times. Pools
  are cut down to what makes them small, or ample, for each workload: see its table.
- *forecast*: what is expected within 60 s is passed over, up to half of the tier. Without: the
  policy alone. Forecasts come from the queue's order, and for both kinds of agents from hints of
  the next call: those of the recorded sessions are the recorded pauses, so perfect; those of the
  generated ones are the median of what the tool takes.
- Others were tried and are gone: `docs/adr/0017-lru-behind-a-forecast.md`.
- `infinite`: nothing leaves the host. `belady` knows all arrivals; `kvflow` knows when each session
  comes back. Both give up what is used latest: the limit for pages found, not for goodput.
- `tlru` is SGLang's T-LRU with a budget of 0.5 s, the tightest objective for the first token.
- Objectives: 60% interactive (TTFT 500 ms, TBT 50 ms), 30% standard (2 s, 100 ms), 10% batch
  (30 s).
- *computed*: prompt tokens that no tier had in time. *to host*, *to disk*: what was written.
"""


WHAT = {
    "mooncake": "recorded: a production chat service, Mooncake FAST'25; blocks of 512 tokens",
    "agent_sessions": "recorded: coding agents, 12 calls each of 18 sessions; pauses times 0.2",
    "azure": "recorded: a chat service's arrivals and lengths; no prefix is shared",
    "taubench": "recorded: a tool-using agent's texts; tiny prompts, so tiny pools",
    "agents": "generated: tool-using agents of three kinds",
    "chat": "generated: conversations, four system prompts",
    "rag": "generated: two of 100 documents a question, by popularity",
}
SUMMARY = f"""\
Ratios to `lru` without forecasts, geometric means over all places that have a run; *computed* and
TTFT: less is better, goodput: more is. *better / level / worse*: places by goodput, level within
{LEVEL:.0%}; *worst* and *best*: goodput.
"""
