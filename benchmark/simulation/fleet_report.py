"""The report of `fleet.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tiered_kv.simulation.tables import Column, Run, markdown, percent, seconds

INTRODUCTION = """\
# Fleets in simulation: where a shared store pays

Made by `python -m benchmark.simulation.fleet --mooncake mooncake_conversation.jsonl --agents
agent_sessions.jsonl`; how the simulator works, and what it leaves out, is in
`docs/simulation.md`. These are simulated figures: passes cost what a roofline of the device's
data sheet says, links are pipes.

- Each server: Llama-3.1-8B on an H200, 256 GB of host memory, a 4 TB disk at 6 GB/s, policy
  `slack`, load or recompute by cost. The store: 1 TB for each server, reached from each at 11
  GB/s each way (100 Gb/s) with 1 ms, no limit in the middle.
- `session`: a conversation stays where it began, at the server that had the fewest requests then.
  `cache-aware`: to the server that was last sent the longest part of the prompt (30% of it at
  least), unless it has 64 requests and half as many more than the idlest. `random`: anywhere.
- Store: `none`; `value`: what was used twice, or takes longer to compute than 0.5 s and than to
  read (the server's default); `all`: everything computed.
- Traffic grows with the fleet: each server brings a sample of a tenth of the trace's
  conversations, with users of its own; what 1% of the prompts begin with is the same for all.
  `mooncake`: 18 minutes of the service at four times their pace. `agents`: the first 8 calls of
  coding agents, pauses times 0.2. Large fleets are simulated for a part of that time (`time`),
  and find less, as their caches are young; the largest with a part of the traffic (`load`), a few
  requests a server, so that nobody waits there: compare runs of one size.
- `replaced`: so often the oldest server gets no more requests, and an empty one takes its place;
  conversations that it had go on with others.
- Hits are shares of all prompt tokens. Bytes through the network are per request.
"""


def report(path: Path, runs: Sequence[Run]) -> Path:
    """Markdown and a picture beside the result file at `path`; returns the Markdown's path."""
    lines = [INTRODUCTION]
    for traffic in dict.fromkeys(run["traffic"] for run in runs):
        some = sorted(
            (run for run in runs if run["traffic"] == traffic), key=lambda run: run["n_servers"]
        )
        lines += [f"## {traffic}", "", markdown(_columns(), some)]
        lines += _sentences(some)
    plot(runs, path.with_suffix(".png"))
    lines += [f"![hits by routing and store]({path.stem}.png)", ""]
    target = path.with_suffix(".md")
    target.write_text("\n".join(lines))
    return target


def _columns() -> list[Column]:
    return [
        ("servers", lambda run: f"{run['n_servers']:,}"),
        ("time", lambda run: f"{run['length']:g}"),
        ("load", lambda run: f"{run.get('load', 1):g}"),
        ("replaced", _replaced),
        ("routing", lambda run: run["routing"]),
        ("store", lambda run: run["store"]),
        ("requests", lambda run: f"{run['n_requests']:,}"),
        ("hits device/host/disk/store", _hits),
        ("all hits", lambda run: percent(_hit_share(run))),
        ("goodput per server, 1/s", lambda run: f"{run['goodput_rps'] / run['n_servers']:.3f}"),
        ("met", lambda run: percent(run["attainment"])),
        ("TTFT mean", lambda run: seconds(run["ttft_s"]["mean"])),
        ("p99", lambda run: seconds(run["ttft_s"]["p99"])),
        ("MB read", lambda run: _megabytes(run, "store to host")),
        ("MB sent", lambda run: _megabytes(run, "host to store")),
        ("stored, TB", lambda run: f"{run['stored_bytes'] / 1e12:.2f}"),
        ("busiest server's requests, of the mean", _busiest),
    ]


def _replaced(run: Run) -> str:
    every_s = run.get("replaced_s", 0)
    return f"one each {every_s:g} s" if every_s else "none"


def _busiest(run: Run) -> str:
    # Who comes and goes is there for a part of the time.
    return "-" if run.get("replaced_s") else f"{run['busiest']:.2f}"


def _hits(run: Run) -> str:
    hits = run["hits"]
    return " / ".join(
        percent(hits.get(tier, 0) / hits["input"]) for tier in ("device", "host", "disk", "shared")
    )


def _hit_share(run: Run) -> float:
    hits: dict[str, Any] = run["hits"]
    return 1.0 - float(hits["computed"]) / float(hits["input"])


def _megabytes(run: Run, link: str) -> str:
    return f"{run['links'].get(link, 0) / run['n_requests'] / 1e6:.0f}"


def _fleet(run: Run) -> tuple[object, ...]:
    """What a run has in common with those of other stores."""
    return run["n_servers"], run["routing"], run["length"], run.get("replaced_s", 0)


def _sentences(runs: Sequence[Run]) -> list[str]:
    """What the store changes for each routing, at each size."""
    by = {(*_fleet(run), run["store"]): run for run in runs}
    lines = []
    for run in runs:
        before = by.get((*_fleet(run), "none"))
        n_servers, routing, store = run["n_servers"], run["routing"], run["store"]
        if store == "none" or before is None:
            continue
        if run.get("replaced_s"):
            routing += ", servers replaced"
        goodput = run["goodput_rps"] / before["goodput_rps"]
        ttft = run["ttft_s"]["mean"] / before["ttft_s"]["mean"]
        lines.append(
            f"- {n_servers:,} servers, {routing}, store {store}: tokens computed "
            f"{run['hits']['computed'] / before['hits']['computed']:.2f} of those without a store, "
            f"goodput {goodput:.2f}, mean TTFT {ttft:.2f}."
        )
    return [*lines, ""]


def plot(runs: Sequence[Run], path: Path) -> None:
    """Hits of each run, stacked by where they came from."""
    from matplotlib.figure import Figure

    traffics = list(dict.fromkeys(run["traffic"] for run in runs))
    figure = Figure(figsize=(12, 4.5 * max(1, len(traffics))), layout="constrained")
    tiers = ("device", "host", "disk", "shared")
    for row, traffic in enumerate(traffics, start=1):
        axes = figure.add_subplot(len(traffics), 1, row)
        some = sorted(
            (run for run in runs if run["traffic"] == traffic),
            key=lambda run: (run["n_servers"], run.get("replaced_s", 0), run["routing"]),
        )
        labels = [
            f"{run['n_servers']:,} {run['routing']}{' (replaced)' * bool(run.get('replaced_s'))}"
            f"\n{run['store']}"
            for run in some
        ]
        bottom = [0.0] * len(some)
        for tier in tiers:
            shares = [100 * run["hits"].get(tier, 0) / run["hits"]["input"] for run in some]
            axes.bar(labels, shares, bottom=bottom, label="store" if tier == "shared" else tier)
            bottom = [a + b for a, b in zip(bottom, shares, strict=True)]
        axes.set_ylabel("prompt tokens found, %")
        axes.set_title(traffic)
        axes.tick_params(axis="x", labelrotation=90, labelsize=7)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=110)
