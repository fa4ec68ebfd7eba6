"""The policy slack against all baselines, and what each of its parts is worth.

    python -m benchmark.simulation.slack --mooncake mooncake_conversation.jsonl \
        --agents agent_sessions.jsonl --out benchmark/results

Takes capacity and baselines from the result files that `baselines.py` left in --out, after making
sure that the simulator still gives the same figures for one of them. For each trace and model: the
policy at 0.8, 1.0 and 1.2 of the best baseline's capacity, with the baselines' cache; at 1.2 with
the server's own, and with each part off in turn; and nearly unloaded, which shows how many
objectives can be met at all. Then one report over all result files in the directory. Run it in the
root of the repository; --only repeats a part, --report makes the report alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmark.simulation.baselines import LOADS, MODELS, add_trace_arguments, base_job, workloads
from benchmark.simulation.slack_report import report
from tiered_kv.core.errors import ConfigError
from tiered_kv.scheduler.policies.slack_config import SlackConfig
from tiered_kv.simulation import schema
from tiered_kv.simulation.capacity import UNLOADED_RATE
from tiered_kv.simulation.jobs import Job, run_job
from tiered_kv.simulation.tables import Run

TOP_LOAD = max(LOADS)
OFF = {
    "putting back, mixing off": SlackConfig(put_back=False, mix_decodes=False),
    "putting back off": SlackConfig(put_back=False),
    "mixing off": SlackConfig(mix_decodes=False),
    "slack off": SlackConfig(slack=False),
    "gangs off": SlackConfig(gangs=False),
    "aging off": SlackConfig(aging=False),
    "forecast off": SlackConfig(forecast=False),
}
"""What is switched off, one part at a time."""
OWN_CACHE = {"load_policy": "cost", "stop_policy": "patience"}
"""The server's own cache."""
CHECKED = "fcfs"
"""The baseline that is run again, to see whether the simulator changed."""


def labelled(job: Job, part: str, name: str, load: float, rate: float, **settings: Any) -> Job:
    """`job` with other settings at `load` times `rate`."""
    changed = replace(job.settings, **settings)
    labels = {"part": part, "name": name, "load": load}
    return replace(job, settings=changed, labels=labels).at_rate(rate * load)


def jobs(job: Job, rate: float) -> list[Job]:
    """All runs for one trace and model; the first repeats a baseline."""
    own = replace(job.settings.cache, **OWN_CACHE)
    found = [labelled(job, "check", CHECKED, TOP_LOAD, rate, policy=CHECKED)]
    for load in sorted(LOADS, key=lambda load: -load):
        found.append(labelled(job, "orders", "slack", load, rate, policy="slack"))
    found.append(labelled(job, "alone", "slack", UNLOADED_RATE / rate, rate, policy="slack"))
    for name, config in OFF.items():
        found.append(labelled(job, "off", name, TOP_LOAD, rate, policy="slack", slack=config))
    for policy in ("slack", "niyama"):
        name = f"{policy}, own cache"
        found.append(labelled(job, "caches", name, TOP_LOAD, rate, policy=policy, cache=own))
    name = "own cache, forecast off"
    off = OFF["forecast off"]
    found.append(labelled(job, "off", name, TOP_LOAD, rate, policy="slack", slack=off, cache=own))
    return found


def same_figures(run: Run, baselines: Sequence[Run]) -> None:
    """Raise ConfigError unless the repeated baseline is as it was."""
    before = next(
        known
        for known in baselines
        if known["labels"]["name"] == CHECKED
        and abs(known["workload"]["rate"] - run["workload"]["rate"]) < 1e-4
    )
    for figures in (before, run):
        if abs(figures["ttft_s"]["mean"] / before["ttft_s"]["mean"] - 1.0) > 1e-3:
            raise ConfigError(
                f"{CHECKED} has a mean TTFT of {run['ttft_s']['mean']:.2f} s now and had "
                f"{before['ttft_s']['mean']:.2f} s: the simulator changed, so run baselines.py "
                "again first."
            )


def measure(
    job: Job, known: dict[str, Any], path: Path, parts: Sequence[str], *, resume: bool
) -> None:
    """All runs for one trace and model into `path`, which is written anew after each.

    resume: keep the runs that are there. Raises ConfigError if the baselines are out of date.
    """
    baselines = [run for run in known["runs"] if run["labels"]["part"] == "orders"]
    runs = schema.read_results(path)["runs"] if resume and path.exists() else []
    done = {(run["labels"]["part"], run["labels"]["name"], run["labels"]["load"]) for run in runs}
    check, *todo = jobs(job, known["capacity"]["rate"])
    same_figures(run_job(check), baselines)
    for one in tqdm(todo, desc=path.stem, unit=" runs"):
        labels = one.labels
        if labels["part"] not in parts:
            continue
        if (labels["part"], labels["name"], float(f"{labels['load']:.6g}")) in done:
            continue
        runs.append(run_job(one))
        schema.write_results(path, runs, known["capacity"])


def main() -> None:
    """Simulate what was asked for and write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_trace_arguments(parser)
    parser.add_argument("--report", action="store_true", help="only write the report again")
    parser.add_argument(
        "--parts", default="orders,alone,off,caches", help="default: all, %(default)s"
    )
    parser.add_argument("--resume", action="store_true", help="keep the runs already in --out")
    options = parser.parse_args()
    for trace, workload in ({} if options.report else workloads(options)).items():
        for model in MODELS:
            name = f"{trace}_{model}"
            if options.only in {None, name}:
                known = schema.read_results(options.out / f"simulation_{name}.json")
                path = options.out / f"simulation_slack-{trace}-{model}.json"
                measure(
                    base_job(workload, model),
                    known,
                    path,
                    options.parts.split(","),
                    resume=options.resume,
                )
                print(json.dumps({"file": str(path)}))
    print(report(options.out))


if __name__ == "__main__":
    main()
