"""How much policies lose where the machine is not what they take it for.

    python -m benchmark.simulation.belief --mooncake mooncake_conversation.jsonl \
        --agents agent_sessions.jsonl

Each order of requests, at loads below and beyond what one server bears, with beliefs that are off
by a factor each way, held on to or learned from as a server does, with passes that vary by 10%.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmark.command_line import RESULTS, parser_of
from tiered_kv.core.device_spec import find_device
from tiered_kv.core.model_spec import find_model
from tiered_kv.simulation import schema
from tiered_kv.simulation.jobs import Job, WorkloadChoice, run_job, run_jobs
from tiered_kv.simulation.settings import GB, Belief, CacheSettings, InstanceSettings
from tiered_kv.simulation.statistics import without_curves
from tiered_kv.simulation.tables import Column, Run, markdown, percent, seconds

BELIEVERS = ("slack", "niyama", "edf")
"""Orders that ask what things take."""
OTHERS = ("hrrn", "fcfs")
BIASES = (0.7, 1.0, 1.4)
NOISE = 0.1
MIXES = {
    "fixed": "interactive:0.6:0.5:0.05,standard:0.3:2:0.1,batch:0.1:30:-",
    "scaled": "interactive:0.6:0.25+3x:0.05,standard:0.3:1+6x:0.1,batch:0.1:15+20x:-",
}
"""Objectives: the same for all of a class, or a base and a multiple of the own unloaded prefill."""


@dataclass(frozen=True, slots=True)
class Case:
    """What policies know."""

    bias: float
    noise: float
    learns: bool

    @property
    def name(self) -> str:
        """For tables."""
        known = "learned" if self.learns else "held on to"
        return "the truth" if not self.noise else f"{self.bias:g}, {known}"


TRUTH = Case(1.0, 0.0, False)
CASES = (
    TRUTH,
    *(Case(bias, NOISE, learns) for learns in (False, True) for bias in BIASES),
)


CAPACITY = {"mooncake": 0.629, "agents": 0.626}
"""Rates of load 1: what `simulation_baselines.md` found for the best baseline on this server."""
LOADS = (0.8, 1.2)


def choices(options: argparse.Namespace) -> dict[str, WorkloadChoice]:
    """Workloads by the name of their traffic, at their own rates."""
    found = {}
    if options.mooncake:
        spec = f"mooncake:{options.mooncake}"
        found["mooncake"] = WorkloadChoice(spec=spec, limit=options.requests, spread_s=3.0)
    if options.agents:
        spec = f"agent_sessions:{options.agents},arrivals=poisson:0.05"
        limit = options.sessions
        found["agents"] = WorkloadChoice(spec=spec, limit=limit, turns=12, pause=0.2)
    return found


def jobs(options: argparse.Namespace) -> list[Job]:
    """All of them."""
    found = []
    known = choices(options).items()
    for (traffic, choice), mix, load, policy in product(
        known, options.mixes, options.loads, options.policies
    ):
        workload = replace(choice, rate=CAPACITY[traffic] * load, slo_mix=MIXES[mix])
        for case in CASES if policy in BELIEVERS else (TRUTH,):
            labels = {"traffic": traffic, "mix": mix, "load": load, "policy": policy}
            found.append(
                Job(
                    workload=workload,
                    settings=settings(policy, case),
                    labels={**labels, "case": case.name},
                    n_warm_up=options.warm_up,
                )
            )
    return found


def settings(policy: str, case: Case) -> InstanceSettings:
    """An H200 with three tiers; all that policies are told of it is off by the same factor."""
    return InstanceSettings(
        model=find_model("Llama-3.1-8B"),
        device=find_device("H200-141"),
        policy=policy,
        noise=case.noise,
        belief=Belief(prefill=case.bias, decode=case.bias, links=case.bias, learns=case.learns),
        cache=CacheSettings(
            host_bytes=256 * GB,
            disk_bytes=4000 * GB,
            load_policy="cost",
            stop_policy="patience",
        ),
    )


def report(path: Path) -> Path:
    """Markdown beside the result file at `path`; returns its path."""
    runs = schema.read_results(path)["runs"]
    lines = [INTRODUCTION]
    for traffic in dict.fromkeys(run["labels"]["traffic"] for run in runs):
        for mix in MIXES:
            some = [
                run
                for run in runs
                if (run["labels"]["traffic"], run["labels"]["mix"]) == (traffic, mix)
            ]
            if not some:
                continue
            lines += [f"## {traffic}, {mix} objectives", ""]
            lines += [f"Objectives met, of {some[0]['n_requests']} requests.", ""]
            lines += [markdown(_columns(some), _rows(some)), ""]
            lines += [_kept(some), ""]
    target = path.with_suffix(".md")
    target.write_text("\n".join(lines))
    return target


def _rows(runs: Sequence[Run]) -> list[Run]:
    """One of each policy and load."""
    return [run for run in runs if run["labels"]["case"] == TRUTH.name]


def _columns(runs: Sequence[Run]) -> list[Column]:
    by = {_key(run): run for run in runs}

    def met(case: str) -> Column:
        def cell(row: Run) -> str:
            run = by.get((*_key(row)[:2], case))
            return "" if run is None else percent(run["attainment"])

        return case, cell

    return [
        ("load", lambda run: f"{run['labels']['load']:g}"),
        ("policy", lambda run: run["labels"]["policy"]),
        *(met(case.name) for case in CASES),
        ("TTFT mean, truth", lambda run: seconds(run["ttft_s"]["mean"])),
    ]


def _key(run: Run) -> tuple[Any, ...]:
    labels = run["labels"]
    return labels["load"], labels["policy"], labels["case"]


def _kept(runs: Sequence[Run]) -> str:
    """The least that slack keeps of what it has with the truth."""
    by = {_key(run): run["attainment"] for run in runs}
    parts = []
    for learns in (False, True):
        worst = min(
            (by[load, "slack", case.name] / by[load, "slack", TRUTH.name], load, case.bias)
            for load in sorted({load for load, _, _ in by})
            for case in CASES
            if case.learns == learns and case is not TRUTH and by[load, "slack", TRUTH.name]
        )
        how = "learned" if learns else "held on to"
        parts.append(f"{worst[0]:.2f} where it is {how} (load {worst[1]:g}, belief {worst[2]:g})")
    return f"Of what it has with the truth, slack keeps at least {parts[0]}, {parts[1]}."


INTRODUCTION = f"""\
# What policies lose where the machine is not what they take it for

Made by `python -m benchmark.simulation.belief --mooncake mooncake_conversation.jsonl --agents
agent_sessions.jsonl`; how the simulator works, and what it leaves out, is in `docs/simulation.md`.

- One H200 with Llama-3.1-8B, 256 GB of host memory, 4 TB of disk. Load 1 is the capacity of the
  best baseline in `simulation_baselines.md`. `--loads`, `--mixes` and `--policies` choose a part;
  what is not below was not simulated.
- A belief of 0.7: prefill, decoding and links are believed to take 0.7 of what they do (the machine
  is 1.43 times slower than it is taken for). Passes vary by {NOISE:.0%}. `the truth` knows it,
  without noise. `hrrn` and `fcfs` order by nothing of the kind.
- `held on to`: policies never learn. `learned`: by the server's own calibrator, from the passes and
  transfers that a server observes.
- Fixed objectives: interactive 60% (TTFT 0.5 s, TBT 50 ms), standard 30% (2 s, 100 ms), batch 10%
  (30 s). Scaled: 0.25 s and 3 times the prompt's own unloaded prefill, 1 s and 6 times, 15 s and
  20 times.
- The first requests by arrival are not judged: that is when a server learns.
"""


def add_traffic(parser: argparse.ArgumentParser, n_requests: int) -> None:
    """The options that `choices` takes."""
    parser.add_argument("--mooncake", type=Path, help="path of mooncake_conversation.jsonl")
    parser.add_argument("--agents", type=Path, help="path of agent_sessions.jsonl")
    help_ = f"of mooncake (default {n_requests})"
    parser.add_argument("--requests", type=int, default=n_requests, help=help_)
    parser.add_argument("--sessions", type=int, default=40, help="of agents (default 40)")


def simulated(todo: Sequence[Job], what: str, n_workers: int = 1) -> list[dict[str, Any]]:
    """The results of `todo` without curves, behind a progress bar that says `what`."""
    with tqdm(desc=what, total=len(todo), unit=" runs") as bar:

        def advance() -> None:
            bar.update(1)

        runs = run_jobs(todo, n_workers=n_workers, progress=advance)
    return [without_curves(run) for run in runs]


def simulate_missing(
    todo: Sequence[Job], out: Path, keep: Callable[[Run], Run] = without_curves
) -> None:
    """Simulate those of `todo` whose labels no run in the result file `out` has.

    The file is written anew after each. keep: what of a run goes there.
    """
    runs: list[Run] = schema.read_results(out)["runs"] if out.exists() else []
    known = [run["labels"] for run in runs]
    for job in tqdm([job for job in todo if job.labels not in known], unit=" runs"):
        runs.append(keep(run_job(job)))
        schema.write_results(out, runs)


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate, write the result file and the report."""
    parser = parser_of("benchmark.simulation.belief", __doc__)
    add_traffic(parser, n_requests=800)
    parser.add_argument("--out", type=Path, default=RESULTS / "simulation_belief.json")
    parser.add_argument("--loads", type=float, nargs="+", default=LOADS, help="default 0.8 1.2")
    parser.add_argument("--mixes", nargs="+", choices=MIXES, default=tuple(MIXES))
    parser.add_argument("--policies", nargs="+", default=(*BELIEVERS, *OTHERS))
    parser.add_argument("--warm-up", type=int, default=100, help="not judged (default 100)")
    parser.add_argument("--workers", type=int, default=1, help="processes (default 1)")
    options = parser.parse_args(arguments)
    schema.write_results(options.out, simulated(jobs(options), "beliefs", options.workers))
    print(report(options.out))


if __name__ == "__main__":
    main()
