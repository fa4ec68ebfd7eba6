"""What it is worth to know when an agent's next call comes, and to learn it where nobody says.

    python -m benchmark.simulation.pauses --agents agent_sessions.jsonl

The same sessions of coding agents under LRU: told nothing, with pauses that the server learns, with
clients who say each pause beforehand; and under Belady's rule, that what is used latest goes, for
sessions of which each next call is known (kvflow), which is the limit. Writes
simulation_pauses.json to --out, anew after each run, and .md beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmark.command_line import RESULTS, parser_of
from benchmark.simulation.belief import MIXES, TRUTH
from benchmark.simulation.belief import settings as server
from tiered_kv.simulation import schema
from tiered_kv.simulation.jobs import Job, WorkloadChoice, run_job
from tiered_kv.simulation.statistics import without_curves
from tiered_kv.simulation.tables import Column, Run, markdown, percent

POOLS = {"device and host": (250_000, 500_000), "device alone": (400_000, 0)}
"""Tokens of KV on the device and on the host."""
KNOWN = {
    "nothing": {},
    "learned": {"learn_pauses": True},
    "said": {"hints": True},
    "Belady's rule": {"eviction": "kvflow"},
}


def jobs(agents: Path, sessions: int, seeds: Sequence[int]) -> list[Job]:
    """All of them."""
    found = []
    for pool, (device, host) in POOLS.items():
        for name, knowledge in KNOWN.items():
            of = server("slack", TRUTH)
            size = of.model.kv_bytes_per_token
            cache = replace(
                of.cache,
                device_bytes=int(device * size),
                host_bytes=int(host * size),
                disk_bytes=0,
                **knowledge,
            )
            for seed in seeds:
                workload = WorkloadChoice(
                    spec=f"agent_sessions:{agents},arrivals=poisson:0.05",
                    limit=sessions,
                    turns=12,
                    pause=0.2,
                    slo_mix=MIXES["scaled"],
                    seed=seed,
                )
                labels = {"pool": pool, "known": name, "seed": seed}
                settings = replace(of, cache=cache)
                found.append(Job(workload=workload, settings=settings, seed=seed, labels=labels))
    return found


def report(path: Path) -> Path:
    """Markdown beside the result file at `path`; returns its path."""
    runs = schema.read_results(path)["runs"]
    lines = [INTRODUCTION]
    for pool in dict.fromkeys(run["labels"]["pool"] for run in runs):
        some = [run for run in runs if run["labels"]["pool"] == pool]
        rows = list(dict.fromkeys(run["labels"]["known"] for run in some))
        device, host = POOLS[pool]
        lines += [f"## {pool}: {device:,} and {host:,} tokens", ""]
        lines += [markdown(_columns(some), [{"labels": {"known": name}} for name in rows]), ""]
    target = path.with_suffix(".md")
    target.write_text("\n".join(lines))
    return target


def _columns(runs: Sequence[Run]) -> list[Column]:
    def of(known: str) -> list[Run]:
        return sorted(
            (run for run in runs if run["labels"]["known"] == known),
            key=lambda run: int(run["labels"]["seed"]),
        )

    def ratio(name: str, to: str, figure: str, part: str | None = None) -> Column:
        def values(known: str) -> np.ndarray:
            found = [run[figure] if part is None else run[figure][part] for run in of(known)]
            return np.array([one["mean"] if isinstance(one, dict) else one for one in found])

        def cell(row: Run) -> str:
            known = row["labels"]["known"]
            return f"{np.exp(np.mean(np.log(values(known) / values(to)))):.3f}"

        return name, cell

    def hits(row: Run) -> str:
        some = of(row["labels"]["known"])
        found = sum(run["hits"]["input"] - run["prefill_tokens"] for run in some)
        return percent(found / sum(run["hits"]["input"] for run in some))

    def met(row: Run) -> str:
        return percent(float(np.mean([run["attainment"] for run in of(row["labels"]["known"])])))

    return [
        ("of pauses is known", lambda row: row["labels"]["known"]),
        ("hits", hits),
        ratio("computed, by Belady's", "Belady's rule", "prefill_tokens"),
        ratio("computed, by nothing known", "nothing", "prefill_tokens"),
        ratio("sessions wait, by nothing known", "nothing", "programs", "waited_s"),
        ratio("sessions take", "nothing", "programs", "completion_s"),
        ("objectives met", met),
    ]


INTRODUCTION = """\
# Pauses between the calls of agents

Made by `python -m benchmark.simulation.pauses --agents agent_sessions.jsonl`; how the simulator
works, and what it leaves out, is in `docs/simulation.md`, how pauses are learned in
`docs/scheduler.md`.

- Llama-3.1-8B on an H200 whose pools are cut down to what is small for these sessions: 24 recorded
  ones, up to 12 calls each, pauses times 0.2, three draws of arrivals and objectives (scaled).
  Ratios are geometric means over the draws.
- `nothing`: LRU that passes over what the queue needs soon. `learned`: pauses of the past, by how
  the answer ended (a tool or a person's turn), as the server learns them; that a session ends after
  its 12th call nobody tells it. `said`: clients say each pause exactly, and the last call.
- `Belady's rule`: what is used latest goes, by exact pauses, instead of LRU: the limit.
- The simulator brings nothing from disk for calls that are foretold, as the server does.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate, write the result file and the report."""
    parser = parser_of("benchmark.simulation.pauses", __doc__)
    parser.add_argument("--agents", type=Path, help="path of agent_sessions.jsonl")
    parser.add_argument("--out", type=Path, default=RESULTS / "simulation_pauses.json")
    parser.add_argument("--sessions", type=int, default=24)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    options = parser.parse_args(arguments)
    if options.agents is not None:
        runs: list[Run] = []
        for job in jobs(options.agents, options.sessions, options.seeds):
            runs.append(without_curves(run_job(job)))
            schema.write_results(options.out, runs)
    print(report(options.out))


if __name__ == "__main__":
    main()
