"""Slack against every baseline under an honest belief: objectives met, and sessions done sooner.

    python -m benchmark.simulation.targets --mooncake mooncake_conversation.jsonl \
        --agents agent_sessions.jsonl

Both models, both traces, below and beyond what one server bears. Passes vary; slack takes the
machine for another one at first, and learns. Writes simulation_targets.json to --out, anew after
each run, and .md beside it; runs that are there are not made again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from benchmark.command_line import RESULTS, parser_of
from benchmark.simulation.baselines import MODELS
from benchmark.simulation.belief import BIASES, MIXES, NOISE, Case, simulate_missing
from benchmark.simulation.belief import settings as server
from benchmark.simulation.targets_report import ALONE, CROWDED, report
from tiered_kv.core.device_spec import find_device
from tiered_kv.core.model_spec import find_model
from tiered_kv.scheduler.policies.slack_config import SlackConfig
from tiered_kv.simulation.jobs import Job, WorkloadChoice
from tiered_kv.simulation.settings import InstanceSettings
from tiered_kv.simulation.statistics import without_curves

CAPACITY = {
    ("mooncake", "8b"): 0.629,
    ("mooncake", "70b"): 0.288,
    ("agents", "8b"): 0.626,
    ("agents", "70b"): 0.615,
}
"""Rates of load 1: what `simulation_baselines.md` found for the best baseline there."""
LOADS = (1.2, 0.8, 1.0, 1.4)
BASELINES = (
    "fcfs",
    "lpm",
    "hrrn",
    "sglang-hrrn",
    "shortest-prefill-first",
    "k-lpm",
    "edf",
    "niyama",
    "sliding-serve",
    "plas",
    "atlas",
    "program-fcfs",
    "pausing",
)
PARTS = {
    "no programs, no working sets": SlackConfig(programs=False, working_set=False),
    "no working sets": SlackConfig(working_set=False),
    "putting back off": SlackConfig(put_back=False),
    "mixing off": SlackConfig(mix_decodes=False),
    "gangs off": SlackConfig(gangs=False),
    "aging off": SlackConfig(aging=False),
    "forecast off": SlackConfig(forecast=False),
    "slack off": SlackConfig(slack=False),
}
"""What is switched off in turn, at load 1.2."""


def choices(options: argparse.Namespace) -> dict[tuple[str, str], WorkloadChoice]:
    """Workloads by traffic and model, at their own rates."""
    found = {}
    if options.mooncake:
        spec = f"mooncake:{options.mooncake}"
        for model, limit in zip(MODELS, options.requests, strict=True):
            found["mooncake", model] = WorkloadChoice(spec=spec, limit=limit, spread_s=3.0)
    if options.agents:
        spec = f"agent_sessions:{options.agents},arrivals=poisson:0.05"
        for model in MODELS:
            limit = options.sessions
            found["agents", model] = WorkloadChoice(spec=spec, limit=limit, turns=12, pause=0.2)
    return found


def jobs(options: argparse.Namespace) -> list[Job]:
    """All of them, what the baselines do first."""
    found: list[Job] = []
    cells = [
        (traffic, model, load)
        for traffic, model in choices(options)
        for load in (*LOADS, *([CROWDED] if traffic == "agents" else []))
    ]
    for (traffic, model, load), policy in product(cells, BASELINES):
        found.append(_job(options, traffic, model, "scaled", load, policy, 1.0))
    for (traffic, model, load), bias in product(cells, BIASES):
        found.append(_job(options, traffic, model, "scaled", load, "slack", bias))
    for traffic, model in choices(options):
        if traffic == "agents":
            found.append(_job(options, traffic, model, ALONE, 0.01, "fcfs", 1.0))
        if model != "8b":
            continue
        for policy in (*BASELINES, "slack"):
            found.append(_job(options, traffic, model, "fixed", 1.2, policy, 1.0))
        if traffic == "mooncake":
            job = _job(options, traffic, model, "scaled", 1.2, "slack", 1.0)
            for name, config in PARTS.items():
                labels = {**job.labels, "part": "off", "name": name}
                without = replace(job.settings, slack=config)
                found.append(replace(job, settings=without, labels=labels))
    return [job for job in found if job.labels["part"] in options.parts]


def _job(
    options: argparse.Namespace,
    traffic: str,
    model: str,
    mix: str,
    load: float,
    policy: str,
    bias: float,
) -> Job:
    rate = CAPACITY[traffic, model] * load
    slo_mix = MIXES["scaled" if mix == ALONE else mix]
    workload = replace(choices(options)[traffic, model], rate=rate, slo_mix=slo_mix)
    labels = {"traffic": traffic, "model": model, "mix": mix, "load": load, "bias": bias}
    labels |= {"part": mix, "name": policy}
    case = Case(bias, NOISE, learns=True)
    return Job(workload=workload, settings=settings(policy, model, case), labels=labels)


def settings(policy: str, model: str, case: Case) -> InstanceSettings:
    """The server that a model has (`MODELS`), and what policies know of it."""
    of = server(policy, case)
    name, device, host_bytes = MODELS[model]
    return replace(
        of,
        model=find_model(name),
        device=find_device(device),
        cache=replace(of.cache, host_bytes=host_bytes),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate what is not there yet, write the result file and the report."""
    parser = parser_of("benchmark.simulation.targets", __doc__)
    parser.add_argument("--mooncake", type=Path, help="path of mooncake_conversation.jsonl")
    parser.add_argument("--agents", type=Path, help="path of agent_sessions.jsonl")
    parser.add_argument("--out", type=Path, default=RESULTS / "simulation_targets.json")
    help_ = "of mooncake, for 8B and 70B (default 400 300)"
    parser.add_argument("--requests", type=int, nargs=2, default=(400, 300), help=help_)
    parser.add_argument("--sessions", type=int, default=24, help="of agents (default 24)")
    parser.add_argument("--parts", nargs="+", default=("scaled", "fixed", "off", ALONE))
    options = parser.parse_args(arguments)
    # Of classes nothing is shown, and they would be half of the file.
    simulate_missing(jobs(options), options.out, lambda run: {**without_curves(run), "classes": {}})
    print(report(options.out))


if __name__ == "__main__":
    main()
